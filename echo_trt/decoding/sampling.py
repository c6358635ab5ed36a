"""Sampling that depends on nothing but the request: its distribution, its seed and the token's position.

The randomness is Philox4x32-10 (Salmon et al., SC 2011), a counter-based generator keyed by the seed and counted by the
position, so whichever batch, tree or policy a token is verified in, it is drawn with the same number.
"""

from __future__ import annotations

import numpy as np

from echo_trt.decoding.compiled import compiled

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
_COLDEST = 1e-6  # a temperature that is greedy already, and does not overflow


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Ten rounds on counter [4, n] under key [2, n], 32-bit words held in uint64. Returns [4, n]."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack((c0, c1, c2, c3))


def uniforms(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each (seed, position), both integer [n]. float64 [n]"""
    seeds, positions = np.asarray(seeds).astype(np.uint64), np.asarray(positions).astype(np.uint64)
    zero = np.zeros_like(positions)
    words = philox4x32(
        np.stack((positions & _LOW, positions >> _SHIFT, zero, zero)), np.stack((seeds & _LOW, seeds >> _SHIFT))
    )
    return ((words[0] << np.uint64(21)) ^ (words[1] >> np.uint64(11))).astype(np.float64) * 2.0**-53


def sample(
    logits: np.ndarray, temperature: np.ndarray, top_k: np.ndarray, top_p: np.ndarray, uniform: np.ndarray
) -> np.ndarray:
    """A token for each row of logits [n, V]: argmax at temperature 0, else a draw from the processed distribution.

    temperature, top_k (0: all), top_p (1: all) and uniform are [n]. Temperature comes first, then top-k, then top-p.
    """
    tokens = logits.argmax(axis=1)
    drawn = np.flatnonzero(temperature > 0)
    if len(drawn):
        probs = processed_probabilities(logits[drawn], temperature[drawn], top_k[drawn], top_p[drawn])
        # In vocabulary order, so that rounding cannot swap two nearly equal tokens.
        cumulative = np.cumsum(probs, axis=1, dtype=np.float64)
        threshold = uniform[drawn] * cumulative[:, -1]
        tokens[drawn] = (cumulative > threshold[:, None]).argmax(axis=1)
    return tokens


def processed_probabilities(
    logits: np.ndarray, temperature: np.ndarray, top_k: np.ndarray, top_p: np.ndarray
) -> np.ndarray:
    """Softmax of logits / temperature, zero outside top-k and then outside the nucleus; not renormalised. [n, V]"""
    scaled = logits.astype(np.float32)
    scaled -= scaled.max(axis=1, keepdims=True)
    scaled /= np.maximum(temperature, _COLDEST)[:, None].astype(np.float32)
    probs = np.exp(scaled)
    probs /= probs.sum(axis=1, keepdims=True)
    limited = np.flatnonzero((top_k > 0) & (top_k < probs.shape[1]))
    for k in np.unique(top_k[limited]):  # one partition for each value in use
        rows = limited[top_k[limited] == k]
        smallest = np.partition(probs[rows], -k, axis=1)[:, -k]
        probs[rows] = np.where(probs[rows] >= smallest[:, None], probs[rows], 0)
    nucleus = np.flatnonzero(top_p < 1)
    if len(nucleus):
        probs[nucleus] = _nucleus(probs[nucleus], top_p[nucleus])
    return probs


def _nucleus(probs: np.ndarray, top_p: np.ndarray) -> np.ndarray:
    """Keep the smallest set of best tokens whose share reaches top_p."""
    total = probs.sum(axis=1, dtype=np.float64)
    # Tokens below (1 - p) / V together weigh less than 1 - p: the set lies among the others, which are few to sort.
    floor = (1 - top_p) * total / probs.shape[1]
    row, token = np.nonzero(probs >= floor[:, None])
    value = probs[row, token].astype(np.float64)
    order = np.lexsort((-value, row))
    # Rows are ascending, before and after the sort.
    kept = order[_above(value[order], np.ascontiguousarray(row)) < (top_p * total)[row]]
    out = np.zeros_like(probs)
    out[row[kept], token[kept]] = probs[row[kept], token[kept]]
    return out


@compiled("f8[::1](f8[::1], i8[::1])")
def _above(value: np.ndarray, row: np.ndarray) -> np.ndarray:
    """The sum of a row's values before each: row by row, so that no other row's have a say in how it is rounded."""
    above, total = np.empty(len(value)), 0.0
    for i in range(len(value)):
        if i == 0 or row[i] != row[i - 1]:
            total = 0.0
        above[i] = total
        total += value[i]
    return above
