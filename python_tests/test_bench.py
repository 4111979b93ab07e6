"""The benchmark harness: what it counts, what it refuses, what it writes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from longgen_kernels import AttentionPattern, longgen_attn_func
from longgen_kernels.benchmark.cases import (
    PATTERNS,
    VARIANTS,
    Case,
    Inputs,
    forward_flops,
    length_name,
    make_cases,
    make_inputs,
    parse_length,
)
from longgen_kernels.benchmark.flex import block_mask, mask_mod
from longgen_kernels.benchmark.gate import Gate
from longgen_kernels.benchmark.peers import Ours, Peer, all_peers
from longgen_kernels.benchmark.prepared import Attend, Prepared
from longgen_kernels.benchmark.results import Record
from longgen_kernels.benchmark.runner import Plan, Runner
from longgen_kernels.benchmark.timing import Effort, Timing, measure, measure_by_turns

CPU = torch.device("cpu")
FAST = Effort(budget_s=0.0, warmups=1, min_repeats=2)
SMALL = {
    "sink_window": AttentionPattern.sink_window(sink=3, window=17),
    "blocks": AttentionPattern.sink_window(sink=5, window_blocks=2, block_size=16),
    "strided": AttentionPattern.strided(4, 8, window=20),
    "strided_sink": AttentionPattern.strided(3, 16, window_blocks=1, sink=4, head_phase_step=2, head_phase_offset=1),
    "causal": AttentionPattern.causal(),
}


def small_case(name: str = "strided", seqlen: int = 70) -> Case:
    shape = {"q_heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": torch.float32}
    return Case(name, SMALL[name], seqlen, "small", **shape)


class Stub:
    """A peer made of one function."""

    def __init__(self, name: str, attend: Attend, *, dense_only: bool = False) -> None:
        self.name, self._attend, self._dense_only = name, attend, dense_only

    def available(self, device: torch.device) -> str | None:
        return None

    def unsupported(self, case: Case, device: torch.device) -> str | None:
        return "dense only" if self._dense_only and not case.pattern.is_dense else None

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        return Prepared(self._attend, inputs)


class Wrong(torch.autograd.Function):
    """Right forward, and a gradient of v that is 3% too large."""

    @staticmethod
    def forward(ctx: object, v: Tensor) -> Tensor:
        return v.clone()

    @staticmethod
    def backward(ctx: object, dv: Tensor) -> Tensor:
        return dv * 1.03


def attend_small(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return longgen_attn_func(q, k, v, SMALL["strided"])


def run_stub(peer: Peer, case: Case | None = None, passes: tuple[str, ...] = ("fwd", "bwd")) -> dict[str, Record]:
    plan = Plan.of([case or small_case()], [peer], CPU)
    return {record.which: record for record in Runner(CPU, passes, FAST).run(plan)}


# -- what is counted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_useful_flops_count_every_visible_pair_of_every_query_head(name: str) -> None:
    case = replace(small_case(name), batch=3)
    mask = case.pattern.visible(case.seqlen, heads=case.kv_heads)
    pairs = sum(int(mask[head // case.group].sum()) for head in range(case.q_heads))
    assert forward_flops(case) == 3 * pairs * 2 * (2 * case.head_dim)  # two matmuls of 2 * head_dim each
    assert case.flops("bwd") == 2.5 * case.flops("fwd")


def test_registry_is_frozen_and_named_for_what_it_is() -> None:
    assert PATTERNS["sink_window"] == AttentionPattern.sink_window(sink=128, window=2048)
    assert PATTERNS["strided"] == AttentionPattern.strided(16, 64, window=1024, head_phase_step=1)
    with pytest.raises(TypeError):
        PATTERNS["causal"] = AttentionPattern.bidirectional()
    case = make_cases(["strided"], [131072], ["gqa"])[0]
    assert (case.key, case.q_heads, case.kv_heads, case.dtype) == ("strided/128K/gqa", 32, 8, torch.bfloat16)
    with pytest.raises(FrozenInstanceError):
        case.seqlen = 1


def test_cases_are_unique_and_come_shortest_first() -> None:
    cases = make_cases(PATTERNS, [32768, 8192, 8192], VARIANTS)
    assert len({case.key for case in cases}) == len(cases) == 2 * len(PATTERNS) * len(VARIANTS)
    assert [case.seqlen for case in cases] == sorted(case.seqlen for case in cases)
    with pytest.raises(KeyError):
        make_cases(["nothing"], [8192])


def test_lengths() -> None:
    assert [parse_length(text) for text in ("8K", "128k", "1M", "2304")] == [8192, 131072, 1 << 20, 2304]
    assert all(parse_length(length_name(n)) == n for n in (1, 1000, 1024, 2304, 131072, 1 << 20))
    for text in ("", "K", "0", "-8K", "8KB"):
        with pytest.raises(ValueError):
            parse_length(text)


def test_inputs_are_random_and_repeatable() -> None:
    one, two = (make_inputs(small_case(), CPU) for _ in range(2))
    assert torch.equal(one.q, two.q)
    assert one.k.shape == (1, 70, 2, 8)
    assert float(one.dout.std()) == pytest.approx(1, abs=0.1)


# -- timing ------------------------------------------------------------------------------------------------------------


def test_timing_reports_median_and_quartiles() -> None:
    timing = Timing.of([5.0, 1.0, 2.0, 4.0, 3.0])
    assert timing == Timing(median_ms=3.0, q1_ms=2.0, q3_ms=4.0, min_ms=1.0, repeats=5)


def test_repeats_follow_the_time_budget() -> None:
    effort = Effort(budget_s=0.3, min_repeats=5, max_repeats=100)
    assert [effort.repeats(seconds) for seconds in (1.0, 0.01, 0.0)] == [5, 30, 100]


def test_warm_ups_end_after_their_count_and_their_time() -> None:
    durations: list[float] = []

    def call() -> Tensor:
        start = time.perf_counter()
        time.sleep(0.004)
        durations.append(time.perf_counter() - start)
        return torch.zeros(1)

    measure(call, CPU, Effort(budget_s=0.0, warmups=2, warmup_s=0.02, min_repeats=2))
    warm = durations[:-2]
    assert len(warm) >= 2 and sum(warm[:-1]) < 0.02 < sum(warm) + 1e-3
    durations.clear()
    measure(call, CPU, Effort(budget_s=0.0, warmups=3, min_repeats=2))
    assert len(durations) == 3 + 2


def test_turns_change_their_order_and_begin_with_what_the_caller_undoes() -> None:
    said: list[str] = []

    def call(name: str, seconds: float) -> Callable[[], Tensor]:
        def says() -> Tensor:
            said.append(name)
            time.sleep(seconds)
            return torch.zeros(1)

        return says

    calls = {"slow": call("s", 0.02), "fast": call("f", 0.001)}
    effort = Effort(budget_s=0.0, warmups=2, min_repeats=3)
    timings = measure_by_turns(calls, CPU, effort, before_turn=lambda: said.append("-"))
    assert "".join(said) == "-sf" * 2 + "-ss-ff" + "-ff-ss" + "-ss-ff"
    assert timings["slow"].repeats == timings["fast"].repeats == 3
    assert timings["slow"].min_ms > 19 > timings["fast"].median_ms


def test_results_are_poisoned_before_the_timed_runs() -> None:
    buffer = torch.zeros(4)
    calls = []

    def writes_only_at_first() -> Tensor:
        calls.append(None)
        return buffer.fill_(1) if len(calls) == 1 else buffer

    _, result = measure(writes_only_at_first, CPU, FAST)
    assert isinstance(result, Tensor)
    assert result.isnan().all()


# -- the gate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_gate_passes_a_right_kernel(name: str) -> None:
    case = small_case(name)
    inputs = make_inputs(case, CPU)
    calls = Ours("reference").prepare(case, inputs)
    gate = Gate(case, inputs)
    assert gate.forward_failure(calls.forward()) is None
    assert gate.backward_failure(calls.backward()) is None


def test_gate_checks_rows_of_a_sequence_too_long_to_compare_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longgen_kernels.benchmark.gate.WHOLE_UP_TO", 64)
    case = small_case(seqlen=100)
    inputs = make_inputs(case, CPU)
    gate = Gate(case, inputs)
    out = attend_small(inputs.q, inputs.k, inputs.v)
    assert not gate.whole
    assert gate.forward_failure(out) is None
    for row in (0, 55, 99):
        wrong = out.clone()
        wrong[:, row, 1, 3] += 0.01
        assert "largest error" in str(gate.forward_failure(wrong))
    grads = list(Ours("reference").prepare(case, inputs).backward())
    assert gate.backward_failure(tuple(grads)) is None
    grads[1] = grads[1].clone().index_fill_(1, torch.tensor(20), torch.nan)
    assert gate.backward_failure(tuple(grads)) == "dk holds inf or NaN"


@pytest.mark.parametrize(
    ("wrong", "which", "reason"),
    [
        (lambda q, k, v: attend_small(q, k, v) * 1.001, "fwd", "out: largest error"),
        (lambda q, k, v: longgen_attn_func(q, k, v, SMALL["causal"]), "fwd", "out: largest error"),
        (lambda q, k, v: attend_small(q, k, v) * torch.nan, "fwd", "out: largest error nan"),
        (lambda q, k, v: attend_small(q, k, v)[:, 1:], "fwd", "out has shape"),
        (lambda q, k, v: attend_small(q, k, Wrong.apply(v)), "bwd", "dv: largest error"),
    ],
    ids=["scaled", "another pattern", "NaN", "shape", "gradient"],
)
def test_a_wrong_kernel_is_refused_and_not_timed(wrong: Attend, which: str, reason: str) -> None:
    record = run_stub(Stub("wrong", wrong))[which]
    assert record.status == "refused"
    assert reason in str(record.reason)
    assert record.median_ms is None


def test_a_kernel_that_goes_wrong_later_is_refused() -> None:
    calls = []

    def tired(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(None)
        return attend_small(q, k, v) + (len(calls) > 3)

    record = run_stub(Stub("tired", tired), passes=("fwd",))["fwd"]
    assert record.status == "refused"
    assert "wrong after timing" in str(record.reason)


def test_a_long_sequence_is_timed_only_after_a_short_one_was_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longgen_kernels.benchmark.gate.WHOLE_UP_TO", 64)
    monkeypatch.setattr("longgen_kernels.benchmark.runner.WHOLE_UP_TO", 64)
    monkeypatch.setattr("longgen_kernels.benchmark.runner.CHECK_LENGTH", 48)

    def wrong_key_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # invisible in three spans of rows
        return attend_small(q, k, Wrong.apply(v))

    records = run_stub(Stub("wrong", wrong_key_gradient), small_case(seqlen=100))
    assert records["fwd"].status == "ok"
    assert records["bwd"].status == "refused"
    assert str(records["bwd"].reason).startswith("at 48 tokens: dv")


# -- peers and plans ---------------------------------------------------------------------------------------------------


def test_a_failing_peer_is_a_result_and_stops_nothing() -> None:
    def broken(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise RuntimeError("no such\nkernel")

    plan = Plan.of([small_case()], [Stub("broken", broken), Stub("right", attend_small)], CPU)
    records = {(r.peer, r.which): r for r in Runner(CPU, ("fwd", "bwd"), FAST).run(plan)}
    assert records["broken", "fwd"].status == "error"
    assert records["broken", "bwd"].reason == "RuntimeError: no such kernel"
    assert records["right", "fwd"].status == records["right", "bwd"].status == "ok"


def test_a_failing_backward_leaves_the_forward() -> None:
    def forward_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.requires_grad:
            raise NotImplementedError("no backward")
        return attend_small(q, k, v)

    records = run_stub(Stub("forward_only", forward_only))
    assert records["fwd"].status == "ok"
    assert records["bwd"].reason == "NotImplementedError: no backward"


def test_a_dense_peer_is_measured_on_causal_attention_once() -> None:
    sparse, dense = Stub("sparse", attend_small), Stub("dense", attend_small, dense_only=True)
    cases = make_cases(["sink_window", "strided"], [64], ["tiny"])
    plan = Plan.of(cases, [sparse, dense], CPU)
    assert {case.key: [p.name for p in peers] for case, peers in plan.work.items()} == {
        "sink_window/64/tiny": ["sparse"],
        "causal/64/tiny": ["dense"],
        "strided/64/tiny": ["sparse"],
    }
    assert [(case.name, peer.name) for case, peer, _ in plan.unsupported] == [
        ("sink_window", "dense"),
        ("strided", "dense"),
    ]


def test_every_peer_says_whether_it_runs_and_what_it_expresses() -> None:
    cases = {case.name: case for case in make_cases(PATTERNS, [8192])}
    for name, peer in all_peers().items():
        assert peer.name == name
        reason = peer.available(CPU)
        assert reason is None or (isinstance(reason, str) and reason)
    peers = all_peers()
    assert peers["reference"].available(CPU) is None
    expresses = {
        name: [case for case in cases if peers[name].unsupported(cases[case], CPU) is None]
        for name in ("flex", "cudnn", "fa3")
    }
    assert expresses == {"flex": list(PATTERNS), "cudnn": ["causal"], "fa3": ["window", "causal"]}


@pytest.mark.parametrize("seqlen", [384, 700])
@pytest.mark.parametrize(
    "pattern",
    [
        *SMALL.values(),
        AttentionPattern.strided(2, 128, window=130),
        AttentionPattern.strided(3, 64, window_blocks=2, sink=100),
        AttentionPattern.sink_window(sink=128, window_blocks=1, block_size=128),
    ],
)
def test_flex_masks_from_arithmetic_are_those_of_create_block_mask(pattern: AttentionPattern, seqlen: int) -> None:
    case = replace(small_case(), pattern=pattern, seqlen=seqlen)
    heads = case.q_heads if pattern.head_phase_step else None
    expected = create_block_mask(mask_mod(case), None, heads, seqlen, seqlen, "cpu").as_tuple()
    got = block_mask(case, CPU).as_tuple()
    for one, other in zip(got, expected, strict=True):
        if isinstance(one, Tensor):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
