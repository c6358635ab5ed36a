"""``echo::SuperTreeAttention``, the one custom operator: attention over the packed tokens of a super-tree.

| input                           | shape, type                          | meaning                                    |
|---------------------------------|--------------------------------------|--------------------------------------------|
| query, key, value               | [N, Hq*D], [N, Hk*D], [N, Hk*D]      | packed tokens, after QK norm and RoPE      |
| key_cache, value_cache          | [num_blocks, Hk, block, D]           | paged pool; the N new rows are written     |
| past_lens                       | int32 [B]                            | committed tokens of a request              |
| seq_begins                      | int32 [B+1]                          | where a request's tokens begin in N        |
| block_indices, block_begins     | int32 [sum of blocks], [B+1]         | the block table, ragged                    |
| tree_mask, tree_mask_begins     | uint8 [sum n_i k_i], int32 [B+1]     | row-major ancestor matrices of requests;   |
|                                 |                                      | an empty section means causal              |

Token r of request i sees all past_lens[i] committed tokens, and the tree keys that its mask row allows. A section of
n_i rows has k_i >= n_i columns, of which the last n_i are the request's new tokens. The first k_i - n_i are tokens of
its tree that earlier calls computed: their KV rows are in the pool, behind the committed ones. The new rows are written
behind them, at past_lens[i] + k_i - n_i and on. So a level of a draft computes its new nodes alone.

The attribute ``sliding_window`` restricts a token to the last keys of those that it sees, itself among them; 0: to
none. Along a path that is a window of positions. A window is larger than a tree is deep.
"""

from super_tree_attention.reference import super_tree_attention

__all__ = ["super_tree_attention"]
