"""LFM2 from GGUF files against transformers' network; tests/backends/test_families.py has checkpoints and trees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkpoints import lfm2
from gguf import GGMLQuantizationType
from gguf_files import GGUF_SIZES, write_gguf

from echo_trt.backends.cpu.build import compile_role
from echo_trt.backends.cpu.engine import CPUEngine
from echo_trt.errors import UserError
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.read_config import decoder_config
from echo_trt.models.roles import TargetModule
from echo_trt.models.weights import load_decoder
from echo_trt.speculation.pack import pack


@pytest.mark.parametrize("storage", ["F16", "Q8_0"])
@pytest.mark.parametrize("taps", [2, 3, 4])
def test_a_gguf_file_is_the_same_network(storage, taps, tmp_path):
    theirs = lfm2(**GGUF_SIZES, conv_L_cache=taps)
    file = write_gguf(tmp_path / "m.gguf", theirs, GGMLQuantizationType[storage], pre_tokenizer="lfm2")
    compile_role(TargetModule(load_decoder(open_checkpoint(file), 64)), tmp_path / "target.cpu", "fp32")
    compiled, rows = CPUEngine(tmp_path / "target.cpu", "fp32", 2, threads=2), np.arange(40)
    tokens = np.random.default_rng(5).integers(0, GGUF_SIZES["vocab_size"], 40)
    found = []
    for begin, end in ((0, 1), (1, 3), (3, 40)):
        past, count = np.array([begin]), np.array([end - begin])
        call = pack(tokens[begin:end], rows[begin:end], past, count, np.arange(2)[None], np.arange(end - begin))
        found.append(compiled.run(call)["logits"].copy())
        compiled.commit(np.arange(end - begin), count)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(tokens)[None]).logits[0].numpy()
    np.testing.assert_allclose(np.concatenate(found), wanted, atol=1e-4, rtol=0)


def test_the_width_of_the_mlp_is_what_the_published_model_has():
    config = lfm2().config.to_dict() | {"architectures": ["Lfm2ForCausalLM"], "block_auto_adjust_ff_dim": True}
    published = {"hidden_size": 2048, "block_ff_dim": 12288, "num_attention_heads": 32, "head_dim": 64}  # LFM2-1.2B's
    assert decoder_config(config | published, "config.json").intermediate_size == 8192


def test_what_is_not_stated_is_what_transformers_takes():
    raw = {key: value for key, value in lfm2().config.to_dict().items() if key not in ("norm_eps", "rope_parameters")}
    raw |= {"architectures": ["Lfm2ForCausalLM"], "tie_embedding": True, "tie_word_embeddings": False}
    config = decoder_config(raw | {"block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": None}, "config.json")
    assert (config.rope_theta, config.norm_eps, config.tie_embeddings) == (1e6, 1e-5, True)
    assert config.intermediate_size == 2 * raw["intermediate_size"] // 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"block_auto_adjust_ff_dim": True, "block_multiple_of": 0}, "block_multiple_of is 0"),
        ({"block_ff_dim": "6656"}, "block_ff_dim is '6656'"),
        ({"conv_L_cache": 5}, "conv_L_cache is 5, but 4 is the most"),
        ({"hidden_size": 40}, "hidden_size is 40, but only multiples of 32"),
        ({"layer_types": ["conv"] * 5}, "layer_types must name conv or full_attention"),
        ({"conv_bias": True}, "conv_bias"),
    ],
)
def test_what_is_not_supported_is_refused(changes, named):
    raw = {**lfm2().config.to_dict(), "architectures": ["Lfm2ForCausalLM"], **changes}
    with pytest.raises(UserError, match=named):
        decoder_config(raw, "config.json")
