"""What a target's checkpoint states for requests: its end tokens and sampling parameters."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from echo_trt.bundle.recipe import Sampling
from echo_trt.engine.params import MAX_STOP_TOKENS
from echo_trt.errors import UserError, first_mistake
from echo_trt.models.checkpoint import Checkpoint, read_json
from echo_trt.models.config import DecoderConfig
from echo_trt.models.families import FAMILIES


def end_tokens(checkpoint: Checkpoint, config: DecoderConfig, tokenizer: Any) -> list[int]:
    """Return the end tokens of the configuration, the tokenizer and the family, which may differ."""
    turn = tokenizer.backend_tokenizer.token_to_id(FAMILIES[config.family].end_of_turn)
    ids = [*config.eos_token_ids, tokenizer.eos_token_id, turn]
    generation = checkpoint.path / "generation_config.json"  # where Qwen3 names its second end token
    if generation.exists():
        stated = read_json(generation).get("eos_token_id")
        ids += stated if isinstance(stated, list) else [stated]
    elif checkpoint.path.is_file():  # GGUF names one end token, where Qwen2.5, for one, writes two
        ids.append(tokenizer.backend_tokenizer.token_to_id("<|endoftext|>"))
    # One that is no token of the target's, such as -1 for none, is never written.
    ends = sorted({int(i) for i in ids if i is not None and 0 <= int(i) < config.vocab_size})
    if len(ends) > MAX_STOP_TOKENS:
        raise UserError(
            f"{checkpoint.path} names {len(ends)} end tokens (eos_token_id in config.json, generation_config.json and "
            f"the tokenizer), but a request stops at {MAX_STOP_TOKENS} at most; leave the others out there."
        )
    return ends


def recommended_sampling(checkpoint: Checkpoint, config: DecoderConfig, preferred: Sampling) -> Sampling:
    """Return what requests that say nothing get: what the recipe prefers, else what a checkpoint that samples
    recommends, of GGUF else its family."""
    path, stated = checkpoint.path / "generation_config.json", {}
    if checkpoint.path.is_file():
        path, stated = checkpoint.path, {**FAMILIES[config.family].sampling, **checkpoint.config["generation_config"]}
    elif path.exists() and (written := read_json(path)).get("do_sample"):
        stated = written
    named = {name: stated[name] for name in Sampling.model_fields if stated.get(name) is not None}
    try:
        return Sampling.model_validate(named | preferred.given(), strict=False)
    except ValidationError as error:
        raise UserError(f"{path}: {first_mistake(error)}; fix it, or set do_sample to false.") from None
