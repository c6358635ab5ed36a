"""A small tokenizer, random texts under a grammar, and what makes a text fit a schema."""

from __future__ import annotations

import json
from datetime import date, datetime
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jsonschema import Draft202012Validator, FormatChecker, ValidationError
from jsonschema.validators import extend
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from echo_trt.grammar.compiler import GrammarCompiler
from echo_trt.grammar.state import State, Vocabulary

HERE = Path(__file__).parent
END, TURN_END, OPENS, CLOSES = "<|end|>", "<|turn_end|>", "<think>", "</think>"
VOCABULARY = 1000
END_HASTE = 5  # of an end, the most
LONGEST = 3000  # tokens of a walk: one that takes more has found no end


def rows(name: str) -> list[dict[str, Any]]:
    """Read one of the lists of schemas beside this file."""
    found: list[dict[str, Any]] = json.loads((HERE / name).read_text(encoding="utf-8"))
    return found


@cache
def tokenizer() -> Tokenizer:
    """Return a byte-level BPE of 1,000 tokens, trained on the schemas in several layouts."""
    built = Tokenizer(models.BPE())
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, TURN_END, OPENS, CLOSES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        json.dumps(row, ensure_ascii=False, indent=i % 3 * 2 or None) for i, row in enumerate(rows("schemas.json"))
    ]
    built.train_from_iterator(texts, trainer)
    return built


@cache
def ends() -> tuple[int, ...]:
    return tokenizer().token_to_id(END), tokenizer().token_to_id(TURN_END)


@cache
def spelled() -> tuple[bytes, ...]:
    """Return the bytes of every token; none for control tokens."""
    alphabet = {char: byte for byte, char in _byte_characters().items()}
    texts = [tokenizer().id_to_token(token) for token in range(tokenizer().get_vocab_size())]
    return tuple(b"" if i < 4 else bytes(alphabet[char] for char in text) for i, text in enumerate(texts))


def _byte_characters() -> dict[int, str]:
    """Return the character that stands for each byte in a byte-level vocabulary."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def compiler() -> GrammarCompiler:
    return GrammarCompiler(tokenizer().to_str(), Vocabulary(tokenizer().get_vocab_size(), ends()))


def text_of(tokens: list[int]) -> str:
    """Return what tokens spell. Raises UnicodeDecodeError."""
    return b"".join(spelled()[token] for token in tokens).decode()


def ids_of(text: str) -> list[int]:
    ids: list[int] = tokenizer().encode(text).ids
    return ids


def allowed(state: State) -> np.ndarray:
    """Ids of the tokens that may follow: int64 [n]."""
    return np.flatnonzero(state.allowed(_everything()))


@cache
def _everything() -> np.ndarray:
    return np.arange(tokenizer().get_vocab_size())


@cache
def _haste() -> np.ndarray:
    """How much a token hurries a text to its end: int64 [vocabulary]."""
    ranks = {b"}": 4, b"]": 4, b'"': 3, b",": 1} | dict.fromkeys((b" ", b"\n", b"\t", b"\r", b"{", b"["), 0)
    rank = [2 if text == b"\n" else ranks.get(text[:1], 2) for text in spelled()]
    return np.array([END_HASTE if token in ends() else each for token, each in enumerate(rank)])


def choose(state: State, draw: np.random.Generator, hurry: bool) -> int:
    """Draw a token from those that may follow. An end is taken often; in a hurry, so is what closes most."""
    options = allowed(state)
    assert len(options), "nothing may follow"
    haste = _haste()[options]
    if (hurry and draw.random() < 0.9) or (haste.max() == END_HASTE and draw.random() < 0.3):
        options = options[haste == haste.max()]
    return int(options[draw.integers(len(options))])


def walk(state: State, seed: int, free: int = 40) -> list[int]:
    """Draw a text up to its end: ``free`` tokens uniformly, then in a hurry. The end is left out."""
    draw, tokens = np.random.default_rng(seed), []
    while not state.ended:
        assert len(tokens) < LONGEST, text_of(tokens)
        token = choose(state, draw, len(tokens) >= free)
        following = state.after(token)
        assert following is not None, (text_of(tokens), token)
        state = following
        tokens.append(token)
    return tokens[:-1]


def _multiple(_validator, step, instance, _schema):
    """Divide decimals as they are written; floats would make 0.3 no multiple of 0.1."""
    if isinstance(instance, int | float) and not isinstance(instance, bool):
        quotient = Fraction(repr(instance)) / Fraction(repr(step))
        if quotient.denominator != 1:
            yield ValidationError(f"{instance} is no multiple of {step}")


FORMATS = FormatChecker()


@FORMATS.checks("date", raises=ValueError)
def _is_date(value: object) -> bool:
    """llguidance takes 29 February in every year, and the year 0."""
    if isinstance(value, str) and not value.endswith("-02-29") and not value.startswith("0000-"):
        date.fromisoformat(value)
    return True


@FORMATS.checks("date-time", raises=ValueError)
def _is_moment(value: object) -> bool:
    if isinstance(value, str):
        day, time = value[:10], value[11:]
        assert value[10] in "Tt"
        return _is_date(day) and _is_time(time)
    return True


@FORMATS.checks("time", raises=ValueError)
def _is_time(value: object) -> bool:
    """Check a time; a leap second is allowed."""
    if isinstance(value, str):
        clock = value[:8].replace(":60", ":59")
        fraction, zone = value[8:].rstrip("zZ"), value[-1] in "zZ"
        digits, sign, offset = fraction.partition("+") if "+" in fraction else fraction.partition("-")
        assert zone != bool(sign), value
        assert not digits or (digits[0] == "." and digits[1:].isdecimal()), value
        datetime.fromisoformat(f"2000-01-01T{clock}" + (f"{sign}{offset}" if sign else "+00:00"))
    return True


Validator = extend(Draft202012Validator, {"multipleOf": _multiple})


def assert_fits(text: str, schema: dict[str, Any] | bool) -> None:
    """Check that the text is JSON that the schema validates."""
    try:
        Validator(schema, format_checker=FORMATS).validate(json.loads(text))
    except (ValueError, ValidationError) as error:
        raise AssertionError(f"{text!r} does not fit: {str(error).splitlines()[0]}") from error
