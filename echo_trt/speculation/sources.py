"""The sources of draft tokens: who proposes one, and how that is told wherever it is shown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Proposer:
    """Who proposes tokens. Its index in ``DRAFT_SOURCES`` is what ``SuperTree.source`` holds.

    name    in answers, metrics and snapshots
    label   for readers, in a word or two
    about   for readers who want to know more
    colour  in pictures and terminals: a contrast of 3 to 1 or more on white and on dark pages
    texts   of its tokens on the light and on the dark live page, 4.5 to 1
    line    style of the line below them there, and its thickness in px, 0: as usual; nothing is told by colour alone
    maker   "module:name" of what makes its ``speculation.planner.ChainSource`` (``engine.sources``); "": a network
            proposes its tokens, or several do
    forced  whether its tokens are the only ones that can follow: what else is proposed changes no chance of theirs
    """

    name: str
    label: str
    about: str
    colour: str = ""
    texts: tuple[str, str] = ("", "")
    line: str = "solid"
    thickness: int = 0
    maker: str = ""
    forced: bool = False


TARGET = Proposer("target", "target itself", "none: the target's own next token, one per verification")
# fmt: off
DRAFT_SOURCES = (
    Proposer("head", "draft", "the draft network: a head, block drafter or small model",
           "#2f7de1", ("#0b66c3", "#6cb6ff"), "solid"),
    Proposer("lookup", "copied text", "prompt lookup: text copied from the prompt or the answer so far",
           "#1a9a6c", ("#0a7d4f", "#57c98d"), "dashed", maker="echo_trt.engine.sources.lookup:copies"),
    Proposer("both", "draft and copy", "the draft network and prompt lookup, which agree",
           "#8b6fd6", ("#7a4cc2", "#b99cff"), "double", 3),
    Proposer("ngram", "n-gram", "the table of the target's earlier answers",
           "#c2760c", ("#a85400", "#f0a04b"), "dotted", maker="echo_trt.engine.sources.ngrams:continuations"),
    Proposer("grammar", "grammar", "the grammar, where it allows a single token",
           "#d1568f", ("#b3245f", "#ff8ab5"), "solid", 3, "echo_trt.engine.sources.grammars:GrammarSource", True),
    Proposer("prediction", "prediction", "the client's own prediction of the answer",
           "#13889c", ("#0b6e80", "#4fc3d9"), "dashed", 3, "echo_trt.engine.sources.predictions:predictions"),
    Proposer("call", "tool call", "the declaration of a tool that is called: what stands between its arguments",
           "#8a7a1f", ("#6f6210", "#d3c04d"), "dotted", 3, "echo_trt.engine.sources.calls:calls"),
    Proposer("answer", "earlier answer", "answers of the same sender, learnt while serving",
           "#b0603f", ("#93452a", "#e39a7a"), "double", 3, "echo_trt.engine.sources.answers:answers"),
)
# fmt: on
SOURCES = tuple(source.name for source in DRAFT_SOURCES)
DRAFT, LOOKUP, BOTH, NGRAM, GRAMMAR, PREDICTION, CALL, ANSWER = map(
    SOURCES.index, ("head", "lookup", "both", "ngram", "grammar", "prediction", "call", "answer")
)
