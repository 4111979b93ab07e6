"""Checks and times peers over cases; what goes wrong in one becomes its result and does not stop the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from longgen_kernels.benchmark.cases import Case, Inputs, make_inputs
from longgen_kernels.benchmark.gate import WHOLE_UP_TO, Gate
from longgen_kernels.benchmark.packages import one_line
from longgen_kernels.benchmark.peers import Peer
from longgen_kernels.benchmark.prepared import Prepared
from longgen_kernels.benchmark.results import Record
from longgen_kernels.benchmark.timing import Effort, Result, measure, poison, synchronize

# Where a kernel is compared whole before it is timed on sequences too long for that.
CHECK_LENGTH = 8192


@dataclass
class Plan:
    """Which peers run on which case, and which cannot."""

    work: dict[Case, list[Peer]] = field(default_factory=dict)
    unsupported: list[tuple[Case, Peer, str]] = field(default_factory=list)

    @classmethod
    def of(cls, cases: Iterable[Case], peers: Sequence[Peer], device: torch.device) -> Plan:
        """A peer that cannot express a case is measured on dense causal attention of the same shape, if it has that."""
        plan = cls()
        for case in cases:
            for peer in peers:
                reason = peer.unsupported(case, device)
                if reason is not None:
                    plan.unsupported.append((case, peer, reason))
                runs = case if reason is None else case.dense()
                if reason is None or peer.unsupported(runs, device) is None:
                    contenders = plan.work.setdefault(runs, [])
                    if peer not in contenders:
                        contenders.append(peer)
        return plan

    @property
    def size(self) -> int:
        return sum(len(peers) for peers in self.work.values())


class Runner:
    """Runs a plan on one device.

    A kernel is compared with the reference before it is timed (see gate.py), and what the last timed run returned is
    compared again. On sequences too long to be compared whole it must first pass on a shorter one of the same case.
    """

    def __init__(
        self, device: torch.device, passes: Sequence[str], effort: Effort, *, seed: int = 0,
        log: Callable[[str], None] = lambda message: None,
    ) -> None:  # fmt: skip
        self._device = device
        self._passes = passes
        self._effort = effort
        self._seed = seed
        self._log = log
        self._passed: set[tuple[str, ...]] = set()  # (peer, case, variant, pass) that were right as a whole
        self._lost: str | None = None  # why the device cannot be used any more
        self._current: tuple[Case, Inputs, Gate] | None = None  # serves all peers of the case at hand

    def run(self, plan: Plan) -> Iterator[Record]:
        """One record for each pass of each peer on each case, as they come."""
        for case, peer, reason in plan.unsupported:
            yield from (_record(case, peer, which, "unsupported", reason) for which in self._passes)
        done = 0
        for case, peers in plan.work.items():
            for peer in peers:
                done += 1
                self._log(f"[{done}/{plan.size}] {case.key} {peer.name}")
                yield from self._peer(case, peer)
            self._forget()

    def _peer(self, case: Case, peer: Peer) -> Iterator[Record]:
        refusals: dict[str, str] = {}
        try:
            if self._lost:
                raise RuntimeError(self._lost)
            if case.seqlen > WHOLE_UP_TO:
                refusals = self._check_short(case.at(CHECK_LENGTH), peer)
            inputs, gate = self._inputs_and_gate(case)
            prepared = peer.prepare(case, inputs)
        except Exception as error:
            reason = self._reason(error)
            yield from (_record(case, peer, which, "error", reason) for which in self._passes)
            return
        for which in self._passes:
            if which in refusals:
                yield _record(case, peer, which, "refused", refusals[which])
            else:
                yield self._pass(case, peer, which, prepared, inputs, gate)
        del prepared
        self._free()

    def _pass(self, case: Case, peer: Peer, which: str, prepared: Prepared, inputs: Inputs, gate: Gate) -> Record:
        call, failure = _call_and_check(which, prepared, gate)
        try:
            first_call_s, result = self._first_call(call, inputs)
            wrong = failure(result)
            if wrong:
                return _record(case, peer, which, "refused", wrong)
            del result
            if gate.whole:
                self._passed.add(_identity(peer, case, which))
            peak, extra = self._memory(call)
            timing, result = measure(call, self._device, self._effort)
            wrong = failure(result)
            if wrong:
                return _record(case, peer, which, "refused", f"right at first, wrong after timing: {wrong}")
        except Exception as error:
            return _record(case, peer, which, "error", self._reason(error))
        flops = case.flops(which)
        record = _record(case, peer, which, "ok", None)
        record.median_ms, record.q1_ms, record.q3_ms = timing.median_ms, timing.q1_ms, timing.q3_ms
        record.min_ms, record.repeats = timing.min_ms, timing.repeats
        record.flops, record.tflops = flops, flops / timing.median_ms / 1e9
        record.first_call_s, record.peak_bytes, record.extra_bytes = first_call_s, peak, extra
        record.setup = prepared.setup
        return record

    def _check_short(self, short: Case, peer: Peer) -> dict[str, str]:
        """Why which passes are refused, from a comparison at a length that can be compared whole."""
        unchecked = [which for which in self._passes if _identity(peer, short, which) not in self._passed]
        if not unchecked:
            return {}
        inputs = make_inputs(short, self._device, self._seed)
        gate = Gate(short, inputs, backward="bwd" in unchecked)
        prepared = peer.prepare(short, inputs)
        refusals = {}
        for which in unchecked:
            call, failure = _call_and_check(which, prepared, gate)
            try:
                wrong = failure(self._first_call(call, inputs)[1])
            except Exception as error:
                wrong = self._reason(error)
            if wrong:
                refusals[which] = f"at {short.seqlen} tokens: {wrong}"
            else:
                self._passed.add(_identity(peer, short, which))
        return refusals

    def _first_call(self, call: Callable[[], Result], inputs: Inputs) -> tuple[float, Result]:
        """Seconds and result of a call whose memory held NaN before."""
        poison(tuple(torch.empty_like(x) for x in (inputs.q, inputs.k, inputs.v)))
        synchronize(self._device)
        start = time.perf_counter()
        result = call()
        synchronize(self._device)
        return time.perf_counter() - start, result

    def _memory(self, call: Callable[[], Result]) -> tuple[int | None, int | None]:
        """Peak bytes during a call, in all and beyond what was allocated before it; None where they are not counted."""
        if self._device.type != "cuda":
            return None, None
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        call()
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_allocated(self._device)
        return peak, peak - before

    def _inputs_and_gate(self, case: Case) -> tuple[Inputs, Gate]:
        if self._current is None or self._current[0] != case:
            self._forget()
            inputs = make_inputs(case, self._device, self._seed)
            self._current = case, inputs, Gate(case, inputs, backward="bwd" in self._passes)
        return self._current[1:]

    def _forget(self) -> None:
        self._current = None
        self._free()

    def _free(self) -> None:
        if self._device.type == "cuda" and not self._lost:
            torch.cuda.empty_cache()

    def _reason(self, error: Exception) -> str:
        """The error in one line; notes when it has made the device unusable, as an illegal access does."""
        reason = one_line(error)
        try:
            synchronize(self._device)
        except Exception as sticky:
            self._lost = self._lost or f"the device is unusable after an earlier error: {one_line(sticky)}"
        return reason


def _record(case: Case, peer: Peer, which: str, status: str, reason: str | None) -> Record:
    return Record(case.key, case.to_dict(), peer.name, which, status, reason)


def _identity(peer: Peer, case: Case, which: str) -> tuple[str, ...]:
    return peer.name, case.name, case.variant, which


def _call_and_check(
    which: str, prepared: Prepared, gate: Gate
) -> tuple[Callable[[], Result], Callable[[Result], str | None]]:
    if which == "fwd":
        return prepared.forward, gate.forward_failure
    return prepared.backward, gate.backward_failure
