"""Link selection: Algorithm 1 by hand, a planted relation that training finds again, and the files."""

import pytest
import torch

from fastib.methods.aal import analyze_links
from fastib.methods.links import TABLE_1, read_mask, select_links
from fastib.nn import AttentionLink

LEVELS = torch.tensor([0, 0, 0, 1, 1, 2])
LAYERS = torch.tensor([0, 0, 1, 1])


def test_algorithm_1_by_hand():
    weight = torch.tensor(
        [[8.0, -8.0, 0.5, -0.5], [4.0, 0.0, 0.5, 0.5], [-4.0, 0.0, 0.5, 0.5],
         [0.0, 0.0, 2.0, -6.0], [0.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.0, 0.0]]
    )  # fmt: skip
    selection = select_links(weight, LEVELS, LAYERS, threshold=0.07)
    expected = [[4 / 8, 0.5 / 8], [0.0, 2 / 8], [0.1 / 8, 0.0]]  # magnitudes over the largest; the smallest is 0
    torch.testing.assert_close(selection.strength, torch.tensor(expected).double(), rtol=1e-6, atol=1e-9)
    assert selection.kept.tolist() == [[True, False], [False, True], [False, False]]
    assert selection.mask[:3].tolist() == [[True, True, False, False]] * 3
    assert selection.mask[3:5].tolist() == [[False, False, True, True]] * 2 and not selection.mask[5].any()


def test_the_smallest_link_is_zero_and_missing_ones_do_not_count():
    weight = torch.tensor([[3.0, -1.0], [2.0, float("nan")]])
    selection = select_links(weight, torch.tensor([0, 1]), torch.tensor([0, 1]), 0.4)
    assert selection.strength.tolist() == [[1.0, 0.0], [0.5, 0.0]]
    assert selection.kept.tolist() == [[True, False], [True, False]]
    even = select_links(torch.ones(2, 2), torch.tensor([0, 1]), torch.tensor([0, 1]))
    assert not even.kept.any()


@pytest.mark.parametrize("threshold", [-0.1, 1.0, float("nan")])
def test_bad_threshold(threshold):
    with pytest.raises(ValueError, match=r"threshold: expected a number in \[0, 1\)"):
        select_links(torch.ones(6, 4), LEVELS, LAYERS, threshold)


def test_a_planted_relation_is_found_again(tmp_path):
    """Maps of level l combine the heads of layers l and l + 1 alone; trained links must say so."""
    torch.manual_seed(0)
    levels, layers = torch.arange(3).repeat_interleave(8), torch.arange(4).repeat_interleave(3)
    planted = (layers == levels[:, None]) | (layers == levels[:, None] + 1)
    truth = torch.randn(24, 12).sign() * (0.5 + torch.rand(24, 12)) * planted
    link = AttentionLink(12, 24)
    optimizer = torch.optim.Adam(link.parameters(), lr=0.02)
    for _ in range(400):
        attn = torch.randn(8, 12, 36).softmax(-1)
        loss = link.loss(attn, truth @ attn)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 1e-3 / 36
    tensors = {"levels": levels, "layers": layers, "groups.0.columns": torch.arange(12)}
    tensors |= {"groups.0.channels": torch.arange(24)}
    tensors |= {f"groups.0.link.{name}": value for name, value in link.state_dict().items()}
    analysis = analyze_links(tensors, tmp_path)
    assert read_mask(tmp_path / "links.safetensors").equal(planted)
    (rows,) = analysis.tables.values()
    assert [row["kept layers"] for row in rows.values()] == ["1, 2", "2, 3", "3, 4"]
    assert analysis.note.startswith("144 of 288 links kept")
    assert analysis.files[0].read_bytes().startswith(b"\x89PNG")


def test_table_1():
    assert [last - first + 1 for first, last in TABLE_1["alpha"]] == [3, 5, 3, 3, 3, 6, 6]
    assert [last - first + 1 for first, last in TABLE_1["beta"]] == [2, 5, 3, 3, 4, 5, 4]
