"""The benchmark of captured attention maps, on a small case: its peers agree, and a wrong one is caught."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))
try:
    from benchmarks import bench_capture
    from benchmarks.harness import check
finally:
    sys.path.pop()


def test_peers_agree_with_float64():
    job = bench_capture.small_job("cpu")
    expected = job.reference()
    assert len(expected) == len(job.allowed) and all(result.dtype == torch.float64 for result in expected)
    seen = [check(peer, peer.build()(True), expected, job.allowed) for peer in job.peers]
    assert [(m.status, m.reason) for m in seen] == [("ok", "")] * 3
    assert max(seen[0].errors) < 1e-4
    without_maps = replace(job.peers[2], gated=True)
    assert check(without_maps, without_maps.build()(True), expected, job.allowed).status == "wrong"
