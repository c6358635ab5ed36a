"""The engine core: iterations of any planner over all running requests.

``step`` is one iteration: plan (the planner's draft and choice), pack, verify, accept, commit, observe. Prompts are
computed in chunks inside the same calls.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from echo_trt.backends.base import Engine
from echo_trt.engine.batch import InputBatch
from echo_trt.engine.drafters.eagle3 import Drafter
from echo_trt.engine.drafters.grammars import GuidedDraft
from echo_trt.engine.params import Counters
from echo_trt.engine.request import Request
from echo_trt.engine.sampler import TargetOutput, token_logprobs
from echo_trt.engine.scheduler import Scheduler
from echo_trt.errors import UserError, described, raised_at
from echo_trt.speculation.accept import accept
from echo_trt.speculation.arrays import begins, ragged_arange
from echo_trt.speculation.bill import Bill
from echo_trt.speculation.drafts import Draft, Pass, TimedDraft
from echo_trt.speculation.pacer import Pacer, Seats
from echo_trt.speculation.pack import ForwardBatch, pack
from echo_trt.speculation.planner import RECENT, Iteration, Plan, Planner, StepContext
from echo_trt.speculation.sources import DRAFT
from echo_trt.speculation.super_tree import SuperTree, ancestor_mask

log = logging.getLogger(__name__)

Decided = TypeVar("Decided")
#: Requests with their new tokens.
Emitted = list[tuple[Request, list[int]]]


@dataclass(frozen=True)
class Chunks:
    """Parts of prompts that one iteration computes, C of them, oldest request first.

    slots, counts  int64 [C]: a part's slot and tokens
    owner          int64 [sum counts]: a token's slot
    position       int64 [sum counts]: its position in the text
    requested      bool [sum counts]: whether the log-probability of the prompt's token after it is asked for
    """

    slots: np.ndarray
    counts: np.ndarray
    owner: np.ndarray
    position: np.ndarray
    requested: np.ndarray


@dataclass(frozen=True)
class StepTrace:
    """One step, as the step callback gets it.

    requests  ids of the B decoding requests, in the order of the plan's trees
    drafting  seconds of the draft's passes
    emitted   tokens that were appended to texts
    time      time.time() at the iteration's end
    """

    iteration: Iteration
    requests: list[int]
    drafting: float
    emitted: int
    time: float


class EngineCore:
    """Continuous batching: requests join and leave at any iteration."""

    def __init__(
        self,
        target: Engine,
        drafter: Drafter | None,
        batch: InputBatch,
        planner: Planner,
        eos: Iterable[int],
        chunk: int = 256,
    ):
        """Begin without requests. ``planner`` may be replaced between iterations; texts stay the same.

        eos: token ids that end a text. chunk: prompt tokens computed in one iteration at most; where no request
        decodes, an engine may compute more.
        """
        self.target, self.batch, self.planner, self.chunk = target, batch, planner, chunk
        self.counters, self.bill = Counters(), Bill()
        self.pacer = Pacer(batch.count)
        self.scheduler = Scheduler(batch, tuple(eos), self.counters, self.pacer)
        self.drafter = drafter
        # Takes prefilling slots, and whether nobody decodes; returns those that this pass computes
        self.restore: Callable[[np.ndarray, bool], np.ndarray] | None = None
        self._blamed = set[tuple[str, str]]()  # policies, and where they failed: told once
        # Gets every iteration, on the thread that steps; None: none
        self.step_callback: Callable[[StepTrace], None] | None = None

    @property
    def drafter(self) -> Drafter | None:
        """The draft. Setting it lets the scheduler call its ``forget`` when a request leaves a slot."""
        return self._drafter

    @drafter.setter
    def drafter(self, drafter: Drafter | None) -> None:
        self._drafter = drafter
        if drafter:
            self.scheduler.forget = drafter.forget

    @property
    def proposer(self) -> int:
        """The source that nodes of the source DRAFT are reported as: LOOKUP where the draft copies text."""
        return self.drafter.source if self.drafter else DRAFT

    def step(self) -> Emitted:
        """Run one iteration; return requests with their new tokens. The finished have a finish_reason."""
        self.scheduler.admit()
        seats = self._admit()
        slots, chunks = seats.decoding, self._plan_chunks(seats)
        if len(slots) + len(chunks.slots) == 0:
            return []
        begin = time.perf_counter()
        step_callback = self.step_callback  # another thread may set it at any time
        ids = [request.id for request in self.scheduler.running_in(slots)] if step_callback else []
        # Where all decoding requests have opted out of speculation, neither draft nor planner is called, nor taught. A
        # pass of prompts alone does teach the planner.
        speculates = len(slots) == 0 or bool(self.batch.sampling["speculate"][slots].any())
        drafter = self.drafter if speculates else None
        draft = self._ask(lambda: drafter.begin(slots)) if drafter else None
        load = self._load(seats, len(chunks.owner))
        plan, planning = self._plan(slots, draft, load)
        verified, target = self._verify(plan, slots, chunks)
        with self._timed("accept"):
            path, tokens = accept(verified.tree, verified.next_token)
        before = self.batch.length[slots]
        with self._timed("commit"):
            emitted = self._commit(verified, path, tokens, chunks)
        drafting = draft.seconds if draft else 0.0
        seconds = time.perf_counter() - begin
        rows = np.concatenate((plan.tree.sizes, chunks.counts))
        self.pacer.ran(np.concatenate((slots, chunks.slots)), rows, seconds, len(chunks.owner))
        iteration = Iteration(
            plan=plan,
            load=load,
            path=path[path < len(plan.tree)],  # without the roots of prompts that this pass has completed
            target=target,
            drafts=tuple(draft.passes) if draft else (),
            levels=draft.levels if draft else 0,
            planning=planning,
            seconds=seconds,
            host=seconds - planning - drafting - target.seconds,
        )
        if speculates:
            self._charge(iteration, self.batch.length[slots] - before, emitted)
            self._ask(lambda: self.planner.observe(iteration))
        if step_callback:
            step_callback(StepTrace(iteration, ids, drafting, sum(len(new) for _, new in emitted), time.time()))
        return emitted

    def _ask(self, question: Callable[[], Decided]) -> Decided | None:
        """Return what the policy or its draft answers; None where it fails, which costs the pass its draft alone."""
        try:
            return question()
        except Exception as error:  # a policy may be anybody's file
            self.counters.planner_failures += 1
            line, policy = raised_at(error), self.planner.name
            if (policy, line) not in self._blamed:
                self._blamed.add((policy, line))
                reason = str(error) if isinstance(error, UserError) else f"{described(error)}, at {line}"
                log.warning(
                    "policy %s fails (%s), so this pass goes without its draft or its learning; fix the policy.",
                    policy,
                    reason,
                )
            return None

    def _charge(self, iteration: Iteration, kept: np.ndarray, emitted: Emitted) -> None:
        """Add what the requests that decoded have saved against plain decoding, where the policy knows it.

        kept  int64 [B], tokens that their texts have got
        """
        slots, batch = iteration.load.slots, self.batch
        plain = self._ask(lambda: self.planner.plain_cost(iteration)) if len(slots) else None
        if plain is None:
            return
        charged = np.stack(self.bill.charge(iteration, kept, plain, self.proposer), axis=1)
        batch.record["saved"][slots] = np.nan_to_num(batch.record["saved"][slots]) + charged
        for i in np.flatnonzero(~batch.active[slots]):  # they have left
            emitted[i][0].speculation.saved = tuple(batch.record["saved"][slots[i]].tolist())

    def _hold_for_decoding(self) -> np.ndarray:
        """Return decoding slots, which hold KV blocks for their drafts and verifications; the least urgent give way."""
        while True:
            slots = self.batch.decoding()
            if self.batch.blocks.hold(slots, self.batch.committed[slots] + self.batch.reserve):
                self.counters.evicted_blocks = self.batch.blocks.cache.evicted
                return slots
            self.scheduler.preempt_least_urgent()

    def _admit(self) -> Seats:
        """Return whose requests are in this pass, and how many prompt tokens."""
        decoding, batch = self._hold_for_decoding(), self.batch
        seats = Seats(decoding, batch.committed[decoding], batch.prefilling(), self.chunk)

        def ask(seats: Seats) -> Seats | None:
            return self._ask(lambda: seats.within(self.planner.admit(seats)))

        return self.pacer.admit(seats, ask, time.monotonic())

    def _plan_chunks(self, seats: Seats) -> Chunks:
        """Divide this iteration's prompt budget among prefilling slots (``InputBatch.divide``)."""
        batch, slots, budget = self.batch, seats.prompts, seats.chunk
        if self.restore and len(slots):
            slots = self.restore(slots, len(seats.decoding) == 0)
        if len(slots) == 0:
            return Chunks(slots, slots, slots, slots, slots > 0)
        if len(seats.decoding) == 0:  # no request's next token would wait for a longer call
            budget = max(budget, self.target.prefill_alone)
        self.counters.cached_tokens += batch.skip(slots, budget)
        missing = batch.length[slots] - batch.committed[slots]
        counts = batch.divide(slots, budget, seats.shared)
        if budget > 2:
            # Never prefill exactly one token: the attention kernel rounds a single token differently, and the text
            # would depend on batching.
            counts = np.where(missing - counts == 1, counts - 1, counts)
            counts[counts == 1] = 0
        slots, counts = slots[counts > 0], counts[counts > 0]
        owner = np.repeat(slots, counts)
        position = batch.committed[owner] + ragged_arange(counts)
        requested = (batch.sampling["prompt_logprobs"][owner] >= 0) & (position + 1 < batch.prompt_length[owner])
        return Chunks(slots, counts, owner, position, requested)

    def _load(self, seats: Seats, prompt_tokens: int) -> StepContext:
        batch, slots, pace, context = self.batch, seats.decoding, seats.pace, int(seats.context.sum())
        # The verification emits one token beside the drafted
        max_draft_len = batch.limit[slots] - batch.length[slots] - 1
        max_draft_len[~batch.sampling["speculate"][slots]] = 0
        max_draft_len[batch.committed[slots] == 0] = 0  # a head has nothing to look at yet
        draft_lag = self.drafter.draft_lag(slots) if self.drafter else np.zeros(len(slots), np.int64)
        recent = batch.recent(slots, RECENT)
        return StepContext(slots, max_draft_len, draft_lag, context, recent, batch.admitted[slots], prompt_tokens, pace)

    def _plan(self, slots: np.ndarray, draft: TimedDraft | None, load: StepContext) -> tuple[Plan, float]:
        """Ask the planner. Returns its plan for decoding ``slots`` int64 [B], and seconds beside the draft's passes."""
        batch, counters = self.batch, self.counters
        roots = batch.tokens[slots, batch.length[slots] - 1]
        plan, seconds = Plan.undrafted(roots), 0.0
        if draft is not None and len(slots):
            grammars, begin = batch.grammar[slots], time.perf_counter()
            guided: Draft = GuidedDraft(draft, grammars) if grammars.any() else draft
            maximum = min(batch.reserve, self.target.longest)
            planned = self._ask(lambda: self.planner.plan(roots, guided, load).checked(roots, load, maximum))
            plan = planned or plan
            plan = self.target.exact(plan, batch.committed[slots])
            seconds = time.perf_counter() - begin - draft.seconds
            self.counters.add_seconds("plan", seconds)
            self.counters.add_seconds("draft", draft.seconds)
            counters.draft_passes += len(draft.passes)
        counters.drafted_tokens += len(plan.tree) - len(slots)
        counters.iterations += 1
        if len(plan.tree) > len(slots):
            counters.speculative_iterations += 1
        for depth, requests in enumerate(plan.explanation.candidates.reached.tolist()):
            counters.reached[depth] += requests
        return plan, seconds

    def _verify(self, plan: Plan, slots: np.ndarray, chunks: Chunks) -> tuple[TargetOutput, Pass]:
        """Run the target once over all trees and prompt chunks."""
        batch = self.batch
        with self._timed("pack"):
            ends = batch.committed[chunks.slots] + chunks.counts == batch.length[chunks.slots]
            call = self._build_call(plan, slots, chunks, ends)
            # Summed up before the pass: after it the network's weights have evicted these arrays from the CPU's cache.
            nodes = call.seq_begins[1:] - call.seq_begins[:-1] - 1
            context, node_context = int(call.past_lens.sum()), int((nodes * call.past_lens).sum())
        begin = time.perf_counter()
        outputs = self.target.launch(call)
        finishing = chunks.slots[ends]  # prompts that emit their next token
        verified = TargetOutput(
            tree=plan.tree.with_roots(batch.tokens[finishing, batch.length[finishing] - 1]),
            slots=np.concatenate((slots, finishing)),
            decoding=len(slots),
            outputs=outputs,
            call=call,
            batch=batch,
            probability=plan.probability,
            proposer=self.proposer,
        )
        verified.wait()
        seconds = time.perf_counter() - begin
        self.counters.add_seconds("verify", seconds)
        return verified, Pass(max(len(call.token_ids), call.padded_to), context, seconds, node_context)

    def _build_call(self, plan: Plan, slots: np.ndarray, chunks: Chunks, ends: np.ndarray) -> ForwardBatch:
        """Pack the trees of ``slots`` int64 [B], then ``chunks``; ``ends`` bool [C]: whether a chunk ends its prompt.

        Logit rows are those of all nodes, of the last tokens of prompts, and of tokens whose log-probabilities are
        asked for.
        """
        batch, tree = self.batch, plan.tree
        call_slots = np.concatenate((slots, chunks.slots))
        past = batch.committed[call_slots]
        last = len(tree) + np.cumsum(chunks.counts)[ends] - 1
        requested = len(tree) + np.flatnonzero(chunks.requested)
        return pack(
            token_ids=np.concatenate((tree.token, batch.tokens[chunks.owner, chunks.position])),
            positions=np.concatenate((past[tree.request] + tree.depth, chunks.position)),
            past=past,
            counts=np.concatenate((tree.sizes, chunks.counts)),
            block_table=batch.blocks.table[call_slots],
            logit_rows=np.concatenate((np.arange(len(tree)), last, requested)),
            mask=ancestor_mask(tree) if len(tree) > len(slots) else None,
            padded_to=0 if len(chunks.slots) else plan.padded_to,
            slots=call_slots,
        )

    def _collect_prompt_logprobs(self, verified: TargetOutput, chunks: Chunks) -> None:
        if chunks.requested.any():
            batch, owner, position = self.batch, chunks.owner[chunks.requested], chunks.position[chunks.requested] + 1
            rows, tokens = len(verified.tree) + np.arange(len(owner)), batch.tokens[owner, position].astype(np.int64)
            entries = token_logprobs(verified.outputs["logits"], rows, tokens, batch.sampling["prompt_logprobs"][owner])
            for request, entry in zip(self.scheduler.running_in(owner), entries, strict=True):
                request.prompt_logprobs.append(entry)

    def _commit(self, verified: TargetOutput, path: np.ndarray, emitted: np.ndarray, chunks: Chunks) -> Emitted:
        """Keep the KV rows of visited nodes and of chunks, forget the rest by length, and append the emitted tokens.

        path, emitted  int64 [m], visited nodes of ``verified.tree``, and their tokens
        """
        batch, slots, tree, decoding = self.batch, verified.slots, verified.tree, verified.decoding
        counts = np.bincount(tree.request[path], minlength=len(slots))
        nodes = path[tree.request[path] < decoding]
        owner = slots[tree.request[nodes]]
        position = batch.committed[owner] + ragged_arange(counts[:decoding])
        self._move_accepted(tree, nodes, owner, position)
        # Packed rows are the nodes of the decoding requests, then the chunks' tokens (``_build_call``).
        chunk_rows = len(verified.call.token_ids) - len(chunks.owner) + np.arange(len(chunks.owner))
        rows, lengths = np.concatenate((nodes, chunk_rows)), np.concatenate((counts[:decoding], chunks.counts))
        if states := batch.blocks.states:
            owners = np.concatenate((slots[:decoding], chunks.slots))
            states.take(owners, batch.committed[owners], rows, lengths, decoding)
        self.target.commit(rows, lengths)
        if self.drafter:
            kept = batch.blocks.rows(np.concatenate((owner, chunks.owner)), np.concatenate((position, chunks.position)))
            self.drafter.observe(kept, verified.outputs, rows)
        batch.committed[slots[:decoding]] += counts[:decoding]
        batch.committed[chunks.slots] += chunks.counts
        self._collect_prompt_logprobs(verified, chunks)
        for slot in slots[decoding:]:  # prompts that are complete
            batch.publish(slot)
        self.counters.prompt_tokens += len(chunks.owner)
        return self._emit(verified, path, counts, emitted)

    def _move_accepted(self, tree: SuperTree, nodes: np.ndarray, owner: np.ndarray, position: np.ndarray) -> None:
        """Move the KV rows of accepted ``nodes`` int64 [m] to their positions in the text.

        The pass has written a node's row behind its request's cached tokens, at the node's index in its request's tree.

        owner, position  int64 [m], a node's slot, and its token's position in the text
        """
        written = self.batch.committed[owner] + nodes - begins(tree.sizes)[tree.request[nodes]]
        moved = written != position
        if moved.any():
            from_rows = self.batch.blocks.rows(owner[moved], written[moved])
            self.target.compact_kv(from_rows, self.batch.blocks.rows(owner[moved], position[moved]))

    def _emit(self, verified: TargetOutput, path: np.ndarray, counts: np.ndarray, emitted: np.ndarray) -> Emitted:
        """Append the emitted tokens to their texts, up to stop tokens and limits, and let finished requests go.

        path, emitted  int64 [m], as of ``_commit``
        counts         int64 [B], emitted tokens of a request
        """
        batch, slots = self.batch, verified.slots
        if len(slots) == 0:
            return []
        logprobs, sources = verified.logprobs(path, emitted), verified.sources(path, emitted)
        kept, stopped, full = batch.append(slots, counts, emitted)
        self.pacer.emitted(slots, kept, time.monotonic())
        batch.record["verifications"][slots] += 1
        counted = batch.record["counted"][slots]
        self.counters.verifications += int(counted.sum())
        self.counters.verified_tokens += int(verified.tree.sizes[counted].sum())
        self.counters.emitted_tokens += int(kept[counted].sum())
        if kept.sum() < len(emitted):
            emitted = emitted[ragged_arange(counts) < np.repeat(kept, counts)]
        requests = self.scheduler.running_in(slots)
        for i, entries in logprobs:
            requests[i].logprobs += entries[: kept[i]]
        for i, proposed in sources:
            requests[i].sources += proposed[: kept[i]]
        drafted, accepted = (verified.tree.sizes - 1).tolist(), np.maximum(kept - 1, 0).tolist()
        for request, nodes, length in zip(requests, drafted, accepted, strict=True):
            if nodes:
                request.speculation.drafts.append((nodes, length))
                self.counters.accepted[length] += 1
        verified.walk.follow(kept, emitted)
        stopped[[*verified.walk.failures]] = True  # a text whose grammar failed ends here, too
        for i in (stopped | full).nonzero()[0]:
            request = requests[i]
            request.failure = verified.walk.failures.get(i, "")
            request.finish_reason = "stop" if stopped[i] else "length"
            if request.failure:  # what the request asks for cannot be had
                request.finish_reason = "invalid"
            self.scheduler.leave(request)
        ends, tokens = begins(kept).tolist(), emitted.tolist()
        return [(request, tokens[ends[i] : ends[i + 1]]) for i, request in enumerate(requests)]

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.counters.add_seconds(phase, time.perf_counter() - start)
