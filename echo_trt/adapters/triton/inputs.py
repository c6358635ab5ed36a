"""The inputs of a request to Triton, defined once.

``model_repo/echo/config.pbtxt`` and the table of ``docs/triton-api.md`` say the same; a test compares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from echo_trt.engine.parameter import INT32
from echo_trt.engine.params import PARAMETERS

DATATYPES = {int: "INT32", float: "FP32", bool: "BOOL", str: "BYTES", dict: "BYTES"}
MAX_STOP_WORDS = 64


@dataclass(frozen=True)
class Tensor:
    """One input of the model.

    datatype  as Triton's protocols name it
    default   what an absent tensor stands for; None: nothing
    doc       a line for the docs
    values    for the docs, where not every value of the datatype is taken
    many      whether it holds any number of values, else one
    """

    name: str
    datatype: str
    default: Any
    doc: str
    values: str = ""
    many: bool = False


def _sampling(name: str) -> Tensor:
    known = PARAMETERS[name]
    many = isinstance(known.default, tuple | dict)
    facts: dict[str, Any] = {
        "datatype": "UINT64" if known.high > INT32 else DATATYPES[known.kind],
        "default": None if many else known.default,
        "doc": known.doc,
        "values": known.values,
        "many": many,
    }
    return Tensor(known.tensor or name, **(facts | DIFFERENT.get(name, {})))


#: What the tensors of some sampling parameters say otherwise.
DIFFERENT: dict[str, dict[str, Any]] = {
    "stop": {"doc": f"up to {MAX_STOP_WORDS}; {PARAMETERS['stop'].doc}"},
    "structured": {"doc": f"JSON: {PARAMETERS['structured'].doc}"},
    "latency": {"doc": f"JSON, or a class's name: {PARAMETERS['latency'].doc}"},
    "prediction": {"datatype": "BYTES", "default": "", "values": "", "many": False},
    "logprobs": {
        "default": 0,
        "doc": "log-probabilities of this number of best tokens at each position, with `return_log_probs`",
    },
    "prompt_logprobs": {
        "doc": "log-probabilities of the prompt, first in `logprobs`, with this number of best tokens per position"
    },
}
INPUTS: tuple[Tensor, ...] = (
    Tensor("text_input", "BYTES", None, "text to continue, or one user turn where `chat` is true"),
    Tensor("chat_messages", "BYTES", None, 'JSON list of `{"role", "content"}`, put into the bundle\'s chat template'),
    Tensor("tools", "BYTES", None, "JSON list of OpenAI's tools, for the chat template"),
    Tensor(
        "chat_template_kwargs",
        "BYTES",
        None,
        'JSON object: variables of the chat template, as `{"enable_thinking": false}`',
    ),
    Tensor("input_ids", "INT32", None, "the prompt's token ids, as they are", many=True),
    Tensor("chat", "BOOL", False, "whether `text_input` is one user turn"),
    Tensor("add_special_tokens", "BOOL", True, "false: no special tokens of the tokenizer around `text_input`"),
    Tensor("logit_bias_ids", "INT32", None, "tokens whose logits are changed", many=True),
    Tensor("return_log_probs", "BOOL", False, "log-probabilities of the answer's tokens"),
    *map(_sampling, PARAMETERS),
    Tensor(
        "stream",
        "BOOL",
        False,
        "several responses; over HTTP use `generate_stream` then ([why](triton-api.md#limits-of-triton))",
    ),
    Tensor("exclude_input_in_output", "BOOL", True, "false: the prompt precedes the answer, unless it is a chat"),
    Tensor("return_perf_metrics", "BOOL", False, "the statistics below"),
    Tensor(
        "priority",
        "INT32",
        0,
        "lowest first, then by arrival; where KV blocks are short, the highest number is preempted first; "
        "-2147483648 is for [probes](serving.md#probes)",
    ),
    Tensor("deadline_ms", "INT32", 0, "after so long the answer ends as it is; 0 is never", "0 or more"),
)
DEFAULTS = {tensor.name: tensor.default for tensor in INPUTS}
#: What TensorRT-LLM's newer Triton model (llmapi) calls these inputs; its datatypes are ours.
ALIASES = {
    "streaming": "stream",
    "min_tokens": "min_length",
    "sampling_param_stop": "stop_words",
    "sampling_param_exclude_input_from_output": "exclude_input_in_output",
}
_SAME = ("max_tokens", "temperature", "top_k", "top_p", "frequency_penalty", "presence_penalty", "seed")
ALIASES |= {f"sampling_param_{name}": name for name in (*_SAME, "return_perf_metrics")}
_DATATYPES = {tensor.name: (tensor.datatype, tensor.many) for tensor in INPUTS}
INPUTS += tuple(
    Tensor(alias, _DATATYPES[name][0], None, f"as `{name}`", many=_DATATYPES[name][1])
    for alias, name in ALIASES.items()
)
