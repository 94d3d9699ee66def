"""The benchmark harness: its arithmetic, its gate, its tables, and its peers on a small case."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def module(name):
    """A module of the benchmarks, which are no installed package: the checkout is on the path while it is imported."""
    sys.path.append(str(ROOT))
    try:
        return importlib.import_module(f"benchmarks.{name}")
    finally:
        sys.path.remove(str(ROOT))


harness, report = module("harness"), module("report")
machine, memory, ceilings = module("machine"), module("memory"), module("ceilings")
mhca, house = module("peers.mhca_attention"), module("house")
daff = module("peers.daff")
involution = module("peers.involution")
generalized_conv = module("peers.generalized_conv")


def right_step(checking):
    return torch.tensor([3.0, 4.0]), torch.tensor([1.0])


def wrong_step(checking):
    return torch.tensor([3.0, 4.5]), torch.tensor([1.0])


def make_job(*peers, **options):
    """A job whose right results are those of `right_step`."""
    return house.Job(
        key="case",
        op="op",
        mode="train",
        device="cpu",
        describe={"shape": {"N": 4}, "dtype": "float32"},
        peers=peers,
        reference=lambda: right_step(True),
        allowed={"out": 1e-3, "grad": 1e-3},
        **({"flops": 2e9, "bytes": 1e9, "seconds": 0.0, "min_rounds": 2, "memory": False} | options),
    )


def test_quantiles_and_spread():
    assert [harness.quantile([3, 1, 2], share) for share in (0, 0.25, 0.5, 1)] == [1, 1.5, 2, 3]
    seen = harness.Measurement(samples_ms=[4.0, 1.0, 2.0, 3.0, 5.0]).as_dict()
    assert seen["median_ms"] == 3 and seen["min_ms"] == 1 and seen["rounds"] == 5
    assert seen["q20_ms"] == pytest.approx(1.8) and seen["spread"] == pytest.approx((4.2 - 1.8) / 3)


@pytest.mark.parametrize(
    ("result", "error"),
    [([3.0, 4.0], 0.0), ([3.0, 4.5], 0.1), ([3.0, math.nan], math.inf), ([3.0, 4.0, 0.0], math.inf)],
)
def test_relative_error(result, error):
    assert harness.relative_error(torch.tensor(result), torch.tensor([3.0, 4.0])) == pytest.approx(error)


def test_gate_lets_right_peers_alone_be_timed():
    def unavailable():
        raise harness.Unavailable("no such hardware")

    def broken():
        raise KeyError("lost")

    steps, seen = harness.admit(
        [
            harness.Peer("right", lambda: right_step),
            harness.Peer("wrong", lambda: wrong_step),
            harness.Peer("unavailable", unavailable),
            harness.Peer("broken", broken),
            harness.Peer("short", lambda: lambda checking: right_step(checking)[:1]),
            harness.Peer("floor", lambda: wrong_step, gated=False),
            harness.Peer("infinite", lambda: lambda checking: (torch.tensor(math.nan),), gated=False),
        ],
        right_step(True),
        {"out": 1e-3, "grad": 1e-3},
    )
    assert list(steps) == ["right", "floor"]
    assert {name: measured.status for name, measured in seen.items()} == {
        "right": "ok",
        "wrong": "wrong",
        "unavailable": "unavailable",
        "broken": "unavailable",
        "short": "wrong",
        "floor": "ok",
        "infinite": "wrong",
    }
    assert seen["wrong"].reason == "error of out 1.0e-01, allowed 1e-03"
    assert seen["unavailable"].reason == "no such hardware"
    assert "KeyError" in seen["broken"].reason
    assert seen["wrong"].max_error == pytest.approx(0.5)


def test_a_backlog_is_that_of_its_own_step():
    """What one call took to compile makes no later one wait."""
    assert harness.backlog_cycles([]) == harness.backlog_cycles([30.0]) == 2_000_000
    assert harness.backlog_cycles([8e6, 2000.0, 2500.0]) == 8_000_000
    assert harness.backlog_cycles([8e6]) == 100_000_000


def test_rounds_are_interleaved_in_orders_drawn_anew():
    calls = []
    steps = {name: (lambda checking, name=name: calls.append(name)) for name in "abcd"}

    def timer(step):
        step(False)
        return float(len(calls))

    samples = harness.interleave(steps, timer, seconds=1.0, min_rounds=40, max_rounds=40, warmup=1)
    rounds = ["".join(calls[k : k + 4]) for k in range(0, len(calls), 4)]
    assert rounds[0] == "abcd" and len(rounds) == 41
    assert all(sorted(order) == list("abcd") for order in rounds)
    for name in "abcd":
        assert samples[name] == [4 * k + order.index(name) + 1.0 for k, order in enumerate(rounds) if k]
        before = [order[order.index(name) - 1] for order in rounds[1:] if order[0] != name]
        assert {before.count(other) > 3 for other in "abcd" if other != name} == {True}


def test_a_very_slow_peer_gets_three_rounds():
    durations = {"fast": 1.0, "slow": 5000.0}
    steps = {name: (lambda checking, name=name: name) for name in durations}
    samples = harness.interleave(steps, lambda step: durations[step(False)], seconds=1.0, min_rounds=5, max_rounds=8)
    assert len(samples["slow"]) == 3 and len(samples["fast"]) == 8


@pytest.mark.parametrize("rpe_dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_peers_agree_with_the_reference(rpe_dropout, dtype, layout):
    inputs = mhca.Inputs(mhca.Case(2, 3, 4, 8, dtype, "train", rpe_dropout, layout=layout))
    peers = [peer for peer in mhca.peers(inputs) if "compiled" not in peer.name]
    _, seen = harness.admit(peers, mhca.reference(inputs, images=1), mhca.allowed(dtype))
    right = {"fastib", "eager", "sdpa mask", "sdpa no bias"}
    right |= set() if rpe_dropout else {"sdpa augmented split" if dtype == "bfloat16" else "sdpa augmented"}
    assert {name: seen[name].reason for name in right} == dict.fromkeys(right, "")
    assert seen["flex"].status == "unavailable" and "CPU" in seen["flex"].reason
    if rpe_dropout:
        assert "low rank" in seen["sdpa augmented"].reason


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_peers_of_involution_agree_with_the_reference(layout, dtype, stride):
    inputs = involution.Inputs(involution.Case(2, 32, 9, dtype, "train", 3, stride, layout))
    peers = [peer for peer in involution.peers(inputs) if "compiled" not in peer.name]
    _, seen = harness.admit(peers, involution.reference(inputs, images=1), involution.allowed(dtype))
    assert {name: measured.reason for name, measured in seen.items()} == dict.fromkeys(seen, "")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["train", "forward"])
def test_peers_of_daff_agree_with_the_reference(mode, dtype):
    inputs = daff.Inputs(daff.Case(6, 20, 5, dtype, mode))
    peers = [peer for peer in daff.peers(inputs) if "compiled" not in peer.name]
    _, seen = harness.admit(peers, daff.reference(inputs), daff.allowed(dtype, mode == "train"))
    assert {name: measured.reason for name, measured in seen.items()} == dict.fromkeys(seen, "")


@pytest.mark.parametrize("part", ["conv", "shift"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_peers_of_generalized_conv_agree_with_the_reference(layout, dtype, part):
    case = generalized_conv.Case(2, 36, 9, 7, dtype, "train", layout, part)
    inputs = generalized_conv.Inputs(case)
    peers = [peer for peer in generalized_conv.peers(inputs) if "compiled" not in peer.name]
    _, seen = harness.admit(peers, generalized_conv.reference(inputs), case.allowed())
    assert {name: measured.reason for name, measured in seen.items()} == dict.fromkeys(seen, "")


def test_gate_catches_a_peer_without_the_position_term():
    inputs = mhca.Inputs(mhca.Case(2, 3, 4, 8, "bfloat16", "forward"))
    peer = harness.Peer("claims to be right", lambda: mhca.make_step(inputs, mhca.sdpa_plain))
    _, seen = harness.admit([peer], mhca.reference(inputs), mhca.allowed("bfloat16", trains=False))
    assert seen["claims to be right"].status == "wrong"


def test_inputs_are_drawn_again_the_same():
    inputs = mhca.Inputs(mhca.Case(1, 2, 3, 8, "float32", "train", 0.1))
    before = [leaf.detach().clone() for leaf in inputs.leaves]
    inputs.release()
    assert all(torch.equal(leaf, old) for leaf, old in zip(inputs.leaves, before, strict=True))
    assert all(leaf.requires_grad for leaf in inputs.leaves)


def test_peak_memory_counts_what_lives_at_once():
    trace = [
        {"name": "[memory]", "ts": time, "args": {"Bytes": size, "Device Type": 0}}
        for time, size in ((3, 50), (1, 100), (2, -100), (4, 60), (5, -50))
    ]
    assert memory.allocation_peak([{"name": "aten::add", "ts": 0}, *trace]) == 110

    def step():
        for _ in range(3):
            scratch = torch.empty(2**18)
        return scratch

    assert 2**20 <= memory.peak_extra_bytes(step, "cpu") <= 2 * 2**20 + 4096


def test_shares_use_the_ceilings_that_apply():
    found = {"fma_float32": 100.0, "dot_bfloat16": "no such instruction", "gemm_bfloat16": 50.0, "copy": 10.0}
    assert ceilings.shares(25.0, 1.0, "bfloat16", found) == {"fma_float32": 0.25, "gemm_bfloat16": 0.5, "copy": 0.1}
    assert ceilings.shares(25.0, 1.0, "bfloat16", found | {"dot_bfloat16": 200.0})["dot_bfloat16"] == 0.125


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("Intel(R) Xeon(R) Platinum 8480C CPU @ 2.00GHz avx512", "intel-xeon-platinum-8480c-avx512"),
        ("AMD EPYC 7R13 Processor", "amd-epyc-7r13"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
    ],
)
def test_slugs(name, slug):
    assert machine.slug(name) == slug


def test_results_round_trip_into_tables(tmp_path, monkeypatch):
    peers = [
        harness.Peer("fastib", lambda: right_step),
        harness.Peer("eager", lambda: right_step),
        harness.Peer("sdpa mask", lambda: wrong_step),
    ]
    times = {"fastib": [1.0, 2.0, 3.0], "eager": [4.0, 4.0, 4.0]}
    monkeypatch.setattr(house, "interleave", lambda steps, timer, **limits: times)
    monkeypatch.setattr(house, "measure_ceilings", lambda device: {"fma_float32": 2000.0, "copy": "not measured"})
    rooms = house.House(house.Options(results=tmp_path, suffix="-kept"))
    goals = (house.Goal(0.75, ("eager", "flex")), house.Goal(0.25, ("eager",)), house.Goal(1.0, ("flex",)))
    job = make_job(*peers, goals=goals)

    rooms.measure(job, ["fastib", "eager"])
    assert not list(tmp_path.iterdir()), "a part of the peers is not kept"
    rooms.seen.clear()
    rooms.measure(job, [peer.name for peer in peers])
    (path,) = tmp_path.iterdir()
    assert path.name == machine.device_slug("cpu") + "-kept.json"
    stored = json.loads(path.read_text())
    ours = stored["cases"]["case"]["peers"]["fastib"]
    assert (ours["median_ms"], ours["gflops"], ours["gbps"]) == (2.0, 1000.0, 500.0)
    assert ours["shares"] == {"fma_float32": 0.5}
    assert stored["cases"]["case"]["peers"]["sdpa mask"]["status"] == "wrong"

    text = report.render(path, "text")
    assert "at most 0.75 x eager / flex: 0.5, met" in text
    assert "at most 0.25 x eager: 0.5, missed by 100%" in text
    assert "at most 1 x flex: not measured" in text
    assert "error of out 1.0e-01, allowed 1e-03" in text
    row = next(line.split() for line in text.splitlines() if line.split()[:1] == ["eager"])
    assert row[1:5] == ["4", "0%", "0.50", "500"]
    assert "| **2** | 4 | - | - | - | - | 0.50 of 0.75; 0.50 of 0.25; - of 1 |" in report.render(path, "markdown")

    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    assert "picture" in report.publish(path)
    assert path.with_suffix(".png").stat().st_size > 1000 and path.with_suffix(".md").exists()


def test_memory_table_shows_the_growth():
    def case(length, size):
        return {"mode": "memory", "shape": {"N": length}, "peers": {"fastib": {"peak_extra_bytes": size * 2**20}}}

    rows = report.memory_rows({"b": case(400, 8), "a": case(100, 2), "c": case(1600, 32)})
    assert rows == [["peer", "N=100", "N=400", "N=1600", "grows as"], ["fastib", "2", "8", "32", "N^1.0"]]


def test_no_case_begins_after_the_budget(monkeypatch):
    monkeypatch.setattr(house, "measure_ceilings", lambda device: {})
    rooms = house.House(house.Options(budget=-1.0))
    with pytest.raises(harness.Unavailable, match="used up"):
        rooms.measure(make_job(harness.Peer("fastib", lambda: right_step)), ["fastib"])


def test_repeated_calls_give_their_median(monkeypatch):
    times = iter([9.0, 1.0, 2.0, 3.0, 4.0, 7.0])
    monkeypatch.setattr(harness, "cpu_timer", lambda step: next(times))
    assert harness.repeated_calls(None, calls=5, seconds=60.0) == 3.0
    assert harness.repeated_calls(None, calls=5, seconds=0.0) == 7.0  # no time for a second one


def test_pytest_benchmark_holds_the_interleaved_samples(tmp_path):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    (tmp_path / "test_replay.py").write_text(
        f"import sys; sys.path.append({str(ROOT)!r})\n"
        "import pytest\n"
        "from benchmarks.replay import REPLAY\n"
        "@pytest.mark.benchmark(timer=REPLAY.now)\n"
        "@pytest.mark.parametrize('samples', [[1.0, 2.0, 6.0], [0.5]])\n"
        "def test_replay(benchmark, samples):\n"
        "    REPLAY.into(benchmark, samples)\n"
        "    assert benchmark.stats.stats.data == pytest.approx([sample * 1e-3 for sample in samples])\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-only", "."]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no worker
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


OPS = [
    "mhca_attention",
    "head_token_attention",
    "involution",
    "generalized_conv",
    "feature_alignment",
    "daff",
    "linear",
]


def test_compiled_peers_are_left_out_first(monkeypatch):
    rooms = house.House(house.Options(budget=100.0))
    slow = harness.Peer("compiled", lambda: right_step, slow_to_build=True)
    fast = harness.Peer("fastib", lambda: right_step)
    assert rooms.hurried(slow) is slow
    rooms.start -= 60.0
    _, seen = harness.admit([rooms.hurried(slow), rooms.hurried(fast)], right_step(True), {"out": 1e-3, "grad": 1e-3})
    assert seen["compiled"].reason == "left out to end within 100 s" and seen["fastib"].status == "ok"
    assert house.House(house.Options()).hurried(slow) is slow


@pytest.mark.parametrize("op", OPS)
def test_every_case_names_its_peers_and_goals_once(op):
    bench = module(f"bench_{op}")
    for device in ("cpu", "cuda"):
        cases = bench.cases(device)
        jobs = [bench.make_job(case, None, quick=False) for case in cases]
        assert len({job.key for job in jobs}) == len(jobs)
        for job in jobs:
            names = [peer.name for peer in job.peers]
            assert names[0] == "fastib" and len(set(names)) == len(names)
            assert {name for goal in job.goals for name in goal.against} <= {*names, "eager low"}
            assert {goal.case for goal in job.goals} <= {"", *(other.key for other in jobs)}


@pytest.mark.parametrize(
    "op", [*OPS, "bootstrap", "rednet", "involution channels_last", "generalized_conv channels_last"]
)
def test_the_memory_checkers_small_case_passes_its_gate(op):
    op, *layout = op.split()
    job = module(f"bench_{op}").small_job("cpu", *layout)
    _, seen = harness.admit(job.peers[:1], job.reference(), job.allowed)
    assert seen["fastib"].status == "ok", seen["fastib"].reason


def test_the_gate_of_a_training_step_sees_a_gradient_that_is_off_by_a_thousandth(monkeypatch):
    import fastib.nn.involution as layer

    right, job = layer.involution, module("bench_rednet").small_job("cpu")

    def wrong(x, weight, backend=None, **options):
        y = right(x, weight, backend=backend, **options)
        return y if backend == "reference" else y + 1e-3 * (y - y.detach())

    expected = job.reference()
    monkeypatch.setattr(layer, "involution", wrong)
    _, seen = harness.admit(job.peers, expected, job.allowed)
    assert [seen[peer.name].status for peer in job.peers] == ["wrong", "ok"]
