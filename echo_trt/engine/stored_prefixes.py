"""The prefix cache beyond a restart: its blocks are written to a store behind the engine, and read where that pays.

A text's blocks are written once its request has left: they then hold what the draft has made of them, too. A thread
copies them out of the pool, where no pass writes to a cached block before the cache has forgotten it. They are read in
between two passes into blocks of a slot's own, from which the engine goes on as if it had computed them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from echo_trt import __version__
from echo_trt.backends.kind import engine_kind
from echo_trt.backends.states import KeptStates
from echo_trt.bundle.manifest import Manifest
from echo_trt.engine.host_memory import bytes_in
from echo_trt.engine.kv_blocks import DIGEST, NEVER, shareable
from echo_trt.engine.llm import LLM
from echo_trt.engine.measure import machine, processor_facts
from echo_trt.errors import DAMAGED, UserError
from echo_trt.files.store import FAILURES, Store, StoredBlock, no_room, reason
from echo_trt.speculation.goodput.model.costs import Curve
from echo_trt.speculation.pack import BLOCK

log = logging.getLogger(__name__)

USUAL_SIZE = "8G"  # of a store; larger: more stays warm
RATE = 2e8  # bytes per second of reading, before the first was timed; larger: a slow disk is tried with more blocks
NEWEST = 0.3  # weight of the newest rate of reading or computing; larger: one slow reading stops more of the next ones
RETRIED = 1.1  # by which a rate that was too low for a text rises, so that one slow reading is not the last
PAUSE = 0.02  # seconds of reading between two passes while requests decode; larger: later tokens for these
TRIES = 3  # copies of a block while the cache gives up others; larger: more blocks of a full pool are kept
REST = 60.0  # seconds without writing after the disk has refused it, and between two copies of what was learnt
STATE = 2  # kind of what is stored, after blocks with (1) and without (0) a draft's KV rows
PATIENCE = 5.0  # seconds that the end waits for what is not yet written; larger: more of it is kept, a later end


def keep_prefixes(llm: LLM, folder: Path | None, size: str) -> StoredPrefixes | None:
    """Let the prefix cache of ``llm`` outlive it in a store; None, with a sentence in the log, where that cannot be."""
    if folder is None:
        return None
    loop, manifest = llm.loop, llm.manifest
    networks = [loop.target.kv_block(0), *([loop.drafter.kv_block(0, True)] if manifest.draft and loop.drafter else [])]
    try:
        if not loop.batch.blocks.cache.enabled:
            raise UserError("there is no prefix cache to keep.")
        if not all(networks):
            raise UserError(f"engine {manifest.engine} lets nobody read its KV blocks here; use an engine on a CPU.")
        store = Store(folder, bytes_in("--store-size", size or USUAL_SIZE), scope_of(manifest, networks))
    except UserError as error:
        log.warning("--store is not used: %s", error)
        return None
    return StoredPrefixes(store, llm, llm.tuning.costs.target.curve())


def scope_of(manifest: Manifest, networks: Sequence[Sequence[np.ndarray]]) -> bytes:
    """Return what KV blocks depend on beside their text: files, versions, the machine, and how a pool has them."""
    loaded = [sys.modules.get(name) for name in (*engine_kind(manifest.engine).tools, "numpy", "numba")]
    reported = processor_facts()
    facts = (
        __version__,
        sorted(manifest.files.items()),
        manifest.precision,
        manifest.recipe.draft_precision,
        machine(manifest),
        reported.get("flags") or reported.get("Features"),
        [getattr(module, "__version__", "") for module in loaded],
        os.environ.get("ONEDNN_MAX_CPU_ISA"),
        [[(part.dtype.str, part.shape) for part in network] for network in networks],
    )
    return hashlib.blake2b(repr(facts).encode(), digest_size=DIGEST).digest()


class StoredPrefixes:
    """The store of an LLM's prefix cache, and of what its policy has learnt.

    ``restore`` and ``released`` are called on the engine's thread.
    """

    def __init__(self, store: Store, llm: LLM, costs: Curve):
        """``costs``: seconds of the target's passes."""
        self._store, self._loop = store, llm.loop
        self._batch, self._blocks, self._costs = llm.loop.batch, llm.loop.batch.blocks, costs
        self._rate, self._damaged, self._resting, self._learnt = RATE, 0, 0.0, time.monotonic()
        self._declined = np.full(self._batch.count, -1)  # [S], serial number of the request whose blocks stayed unread
        self._pace = 1.0  # times what the costs say that prompts take: other work, or a processor that slows down
        self._part = (-1, -1, 0, 0, 0.0)  # slot, serial number, committed, all prompts' tokens and time before a pass
        self._buffers = {drafted: bytearray(sum(v.nbytes for v in self._views(0, drafted))) for drafted in (0, 1)}
        self._planner, self._state = llm.loop.planner, f"learnt by {llm.loop.planner.name}"
        self._load_learnt()
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)
        self._thread.start()
        self._loop.restore, self._blocks.released = self.restore, self.released

    def _load_learnt(self) -> None:
        try:
            if content := self._store.state(self._state):
                self._planner.load(content)
        except (*FAILURES, *DAMAGED) as error:
            log.warning("what was %s is not taken from the store (%s); it is learnt anew.", self._state, reason(error))

    def close(self) -> None:
        """Write what is left and close the store; nothing may be running."""
        self._loop.restore, self._blocks.released = None, lambda keys: None
        self._keep_learnt()
        self._tasks.put(None)
        self._thread.join(PATIENCE)
        if not self._thread.is_alive():
            self._store.close()

    # -- the engine's thread ---------------------------------------------------------------------------------------

    def released(self, keys: Sequence[bytes]) -> None:
        """Keep the blocks of ``keys``, which a text has left in the cache, and what was learnt meanwhile."""
        if keys:
            self._tasks.put(partial(self._keep, keys))
        if time.monotonic() > self._learnt + REST:
            self._keep_learnt()

    def _keep_learnt(self) -> None:
        self._learnt = time.monotonic()
        self._tasks.put(partial(self._store.keep_state, self._state, self._planner.dump()))

    def restore(self, slots: np.ndarray, alone: bool) -> np.ndarray:
        """Read what the store has of the texts of prefilling ``slots`` int64 [n], where that takes less than computing.

        Unless they are ``alone`` it ends after a while. Returns those whose next tokens are to be computed in this
        pass.
        """
        self._compare(slots, alone)
        begin, waiting = time.perf_counter(), list[int]()
        for slot in slots.tolist():
            self._loop.counters.cached_tokens += self._batch.skip(np.array([slot]), 1)  # what was read for another
            first, done, start = int(self._batch.committed[slot]) // BLOCK, 0, time.perf_counter()
            for key, entry in self._worthwhile(slot):
                if not alone and time.perf_counter() - begin > PAUSE and self._blocks.states is None:
                    waiting.append(slot)
                    break
                if not self._read(int(self._blocks.table[slot, first + done]), key, entry):
                    break
                done += 1
            if done and self._put_state(slot, self._blocks.keys[slot][first + done - 1]):
                self._restored(slot, first, done, time.perf_counter() - start)
        if self._store.damaged > self._damaged:
            self._damaged = self._store.damaged
            log.warning("blocks of the store are not as they were written, and computed instead; check its disk.")
        if alone and len(slots) == 1:
            slot, batch = int(slots[0]), self._batch
            before = int(batch.committed[slot]), self._loop.counters.prompt_tokens, time.perf_counter()
            self._part = slot, int(batch.admitted[slot]), *before
        return slots[~np.isin(slots, waiting)]

    def _compare(self, slots: np.ndarray, alone: bool) -> None:
        """Compare what the last pass took with the costs, if it computed a part of the prompt that goes on, alone."""
        slot, admitted, first, tokens, begin = self._part
        if alone and slots.tolist() == [slot] and self._batch.admitted[slot] == admitted:
            done = self._loop.counters.prompt_tokens - tokens
            if done >= self._loop.chunk and done == self._batch.committed[slot] - first:
                ratio = (time.perf_counter() - begin) / self._seconds(done / BLOCK, first / BLOCK)
                self._pace += NEWEST * (ratio - self._pace)

    def _worthwhile(self, slot: int) -> list[tuple[bytes, StoredBlock]]:
        """Return the stored blocks that a slot's text goes on with, or none where computing them takes less."""
        batch, blocks = self._batch, self._blocks
        if blocks.looked[slot] == NEVER:
            return []
        first, run = int(batch.committed[slot]) // BLOCK, list[tuple[bytes, StoredBlock]]()
        drafted = bool(blocks.drafted[blocks.table[slot, :first]].all())
        for key in islice(blocks.keys[slot], first, shareable(int(batch.length[slot]))):
            entry = self._store.find(key)
            # Behind a block without the draft's KV rows, a draft reads what only such blocks have.
            if entry is None or (entry.kind and not drafted):
                break
            drafted = bool(entry.kind)
            run.append((key, entry))
        state = None
        while run and blocks.states and (state := self._store.find(_state_key(run[-1][0]))) is None:
            run.pop()
        size = sum(entry.bytes for _, entry in run) + (state.bytes if state else 0)
        if run and size / self._rate > self._pace * self._seconds(len(run), first):
            if self._declined[slot] != batch.admitted[slot]:
                self._declined[slot], self._rate = batch.admitted[slot], self._rate * RETRIED
            return []
        return run

    def _seconds(self, blocks: float, first: float = 0) -> float:
        """Return the costs' seconds to compute so many blocks of a text from the ``first`` on, in whole chunks."""
        tokens, chunk = blocks * BLOCK, self._loop.chunk
        return tokens * (self._costs(chunk) / chunk + self._costs.per_node * (first * BLOCK + tokens / 2))

    def _read(self, block: int, key: bytes, entry: StoredBlock) -> bool:
        """Read a stored block into the pool; False where it is gone or damaged."""
        begin = time.perf_counter()
        content, views = self._store.read(key, entry), self._views(block, entry.kind)
        if content is None or len(content) != len(self._buffers[entry.kind]):
            self._tasks.put(partial(self._store.drop, key))
            return False
        _copy(views, content, into_pool=True)
        self._blocks.drafted[block] = bool(entry.kind)
        seconds = time.perf_counter() - begin
        self._rate += NEWEST * (len(content) / seconds - self._rate)
        return True

    def _put_state(self, slot: int, key: bytes) -> bool:
        """Let a slot go on from the stored states behind the block of ``key``, if its target has any; else: False."""
        if (states := self._blocks.states) is None:
            return True
        entry = self._store.find(name := _state_key(key))
        content = self._store.read(name, entry) if entry else None
        if content is None:
            self._tasks.put(partial(self._store.drop, name))
            return False
        states.load(slot, key, content)
        return True

    def _restored(self, slot: int, first: int, count: int, seconds: float) -> None:
        """Go on behind ``count`` blocks that were read in so many ``seconds``, and let others find them."""
        batch, counters = self._batch, self._loop.counters
        tokens = (first + count) * BLOCK - int(batch.committed[slot])
        batch.committed[slot] += tokens
        self._blocks.found[slot] += tokens
        counters.cached_tokens += tokens
        counters.restored_blocks += count
        counters.restored_seconds += max(self._pace * self._seconds(count, first) - seconds, 0.0)
        batch.publish(slot)

    def _views(self, block: int, drafted: int) -> list[np.ndarray]:
        drafter = self._loop.drafter
        return [*self._loop.target.kv_block(block), *(drafter.kv_block(block, bool(drafted)) if drafter else ())]

    # -- the store's thread ----------------------------------------------------------------------------------------

    def _work(self) -> None:
        if sys.platform == "linux":  # where threads have priorities of their own: a pass goes before writing
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        while (task := self._tasks.get()) is not None:
            if time.monotonic() < self._resting:
                continue
            try:
                task()
            except FAILURES as error:
                self._resting = time.monotonic() + REST
                self._recover(error)

    def _recover(self, error: Exception) -> None:
        """Make the store anew after a failure; a full disk may have room later."""
        try:
            if no_room(error):
                raise error
            self._store.renew(error)
        except FAILURES as lasting:
            log.warning("the store takes nothing for %.0f s (%s): check its disk.", REST, reason(lasting))

    def _keep(self, keys: Sequence[bytes]) -> None:
        """Write those blocks of a text that are not kept, or without what a draft has made of them meanwhile."""
        store, price = self._store, self._seconds(1)
        new = {key: position for position, key in enumerate(keys) if self._is_new(key)}
        store.touch([key for key in keys if key not in new], price)
        for key, position in new.items():
            if (drafted := self._copied(key)) is None:  # evicted meanwhile, and what follows it as well
                break
            content = self._buffers[drafted]
            store.write(key, drafted, position, content, price)
            self._loop.counters.stored_bytes += len(content)
        if self._blocks.states:
            self._keep_states(self._blocks.states, keys)
        store.commit()

    def _keep_states(self, states: KeptStates, keys: Sequence[bytes]) -> None:
        """Write the states behind blocks of a text, each worth as much as all the text before it."""
        for position, key in enumerate(keys):
            if (state := states.get(key)) is None:
                continue
            name, price = _state_key(key), self._seconds(position + 1)
            if self._store.find(name):
                self._store.touch([name], price)
            else:
                content = b"".join(part.tobytes() for part in state)
                self._store.write(name, STATE, position, content, price)
                self._loop.counters.stored_bytes += len(content)

    def _is_new(self, key: bytes) -> bool:
        entry, block = self._store.find(key), self._blocks.cache.block_of(key)
        return entry is None or (not entry.kind and block is not None and bool(self._blocks.drafted[block]))

    def _copied(self, key: bytes) -> int | None:
        """Copy a cached block into the buffer of those that are drafted (1) or not (0); None: it has left the cache."""
        cache = self._blocks.cache
        for _ in range(TRIES):
            forgotten, block = cache.forgotten, cache.block_of(key)
            if block is None:
                return None
            drafted = int(self._blocks.drafted[block])
            _copy(self._views(block, drafted), self._buffers[drafted], into_pool=False)
            if cache.forgotten == forgotten:  # so no pass has written to the block meanwhile
                return drafted
        return None


def _state_key(key: bytes) -> bytes:
    """Return the name of the states behind a block of ``key`` in the store."""
    return key + b"state"


def _copy(views: Sequence[np.ndarray], content: bytes | bytearray, into_pool: bool) -> None:
    """Copy parts of a pool from or to ``content``, in which they follow each other."""
    begin = 0
    for view in views:
        part = np.frombuffer(content, view.dtype, view.size, begin).reshape(view.shape)
        begin += view.nbytes
        if into_pool:
            view[...] = part
        else:
            part[...] = view
