"""The sources of draft tokens, by the numbers that ``SuperTree.source`` holds."""

#: head: the draft network; lookup: text copied from the request; both: head and copied text proposed the same token;
#: ngram: the table of the target's earlier answers; grammar: the only token that a grammar allows.
DRAFT, LOOKUP, BOTH, NGRAM, GRAMMAR = range(5)
SOURCES = ("head", "lookup", "both", "ngram", "grammar")
