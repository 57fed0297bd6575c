"""What an adapter did, against the dense ΔW by torch.kron and torch.linalg on small layers."""

import math
from types import SimpleNamespace

import pytest
import torch

from dreambooth.errors import UserError
from dreambooth.scoring.denoising import RowLosses
from interpretation import pruning
from interpretation.factors import boundaries, head_boundaries, head_words
from interpretation.measuring import Measured
from interpretation.options import split_arguments
from interpretation.places import CROSS, OTHER, SELF, TEXT, Place, Site, places_of, sites_of
from interpretation.spectra import spectrum_of, without_singular_pair
from interpretation.trials import explained_by_timestep
from kron_formats.architectures import load_architecture
from kron_formats.changes import Factors, LowRank, Replacement, StoredFactors
from kron_formats.decomposition import decompose, digest
from kron_formats.errors import KroneckerError
from kron_formats.names import find_layers
from kron_formats.shifts import Origin, Shift


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def no_kept_decompositions(monkeypatch, tmp_path):
    monkeypatch.setattr("kron_formats.decomposition.cache_folder", lambda: tmp_path)
    return tmp_path


WEIGHT = torch.randn(12, 20, generator=torch.Generator().manual_seed(1))
CHANGES = {
    "kronecker": Factors(torch.randn(3, 5), torch.randn(4, 4)),
    "kronecker of the paper's rows": Factors(torch.randn(3, 5), torch.randn(4, 4), transposed_rows=True),
    "kronecker of rank 1": Factors(torch.randn(1, 20), torch.randn(12, 1)),
    "stored as products": StoredFactors(LowRank(torch.randn(3, 2), torch.randn(2, 5)), torch.randn(4, 4)).multiplied(),
    "lora": LowRank(torch.randn(12, 3), torch.randn(3, 20)),
    "lora larger than its layer": LowRank(torch.randn(12, 30), torch.randn(30, 20)),
    "svdiff": Shift(torch.randn(12), True, "a file"),
    "trained weight": Replacement(lambda: WEIGHT + 0.1, (12, 20)),
}


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_numbers_are_those_of_the_dense_change(change, strength, no_kept_decompositions):
    change = change.scaled(strength)
    dense = change.delta(WEIGHT)
    spectrum = spectrum_of(change, (12, 20), lambda: WEIGHT)
    exact = torch.linalg.svdvals(dense)
    n = len(spectrum.values)
    assert torch.allclose(spectrum.values, exact[:n], atol=1e-5)
    assert not (exact[n:] > 1e-5).any()
    assert math.isclose(spectrum.frobenius, torch.linalg.matrix_norm(dense).item(), rel_tol=1e-5)
    assert math.isclose(spectrum.spectral, torch.linalg.matrix_norm(dense, 2).item(), rel_tol=1e-5)
    assert spectrum.bound >= torch.linalg.matrix_rank(dense, rtol=1e-4)
    p = exact / exact.sum()
    p = p[p > 1e-7]
    assert math.isclose(spectrum.effective_rank, math.exp(-(p * p.log()).sum()), rel_tol=1e-3)
    for rank in (1, 2, 5):
        U, s, V = torch.linalg.svd(dense)
        nearest = (U[:, :rank] * s[:rank]) @ V[:rank]
        held = 1 - (torch.linalg.matrix_norm(dense - nearest) / torch.linalg.matrix_norm(dense)) ** 2
        assert math.isclose(spectrum.share(rank), held.item(), abs_tol=1e-5)
    rank = spectrum.rank_for(0.9)
    assert spectrum.share(rank) >= 0.9 > (spectrum.share(rank - 1) if rank > 1 else 0)


def test_the_effective_rank_of_equal_values_is_their_number_and_that_of_a_product_the_product():
    assert math.isclose(spectrum_of(Factors(torch.eye(3), torch.eye(4)), (12, 12)).effective_rank, 12)
    one = spectrum_of(LowRank(torch.randn(12, 1), torch.randn(1, 20)), (12, 20))
    assert math.isclose(one.effective_rank, 1) and one.rank_for(0.9) == 1
    A, B = torch.randn(3, 5), torch.randn(4, 4)
    whole, *sides = (
        spectrum_of(Factors(*pair), (pair[0].shape[0] * pair[1].shape[0], pair[0].shape[1] * pair[1].shape[1]))
        for pair in ((A, B), (A, torch.ones(1, 1)), (torch.ones(1, 1), B))
    )
    assert math.isclose(whole.effective_rank, sides[0].effective_rank * sides[1].effective_rank, rel_tol=1e-9)
    nothing = spectrum_of(Factors(A, 0 * B), (12, 20))
    assert (nothing.frobenius, nothing.effective_rank, nothing.share(1), nothing.rank_for(0.9)) == (0, 0, 1, 0)


def test_shifts_stop_at_zero_and_need_the_singular_values_of_their_weight(no_kept_decompositions):
    shift = Shift(torch.full((12,), -100.0), True, "a file", Origin(digest(WEIGHT)[:16], ()))
    with pytest.raises(KroneckerError, match="--pretrained_model_name_or_path"):
        spectrum_of(shift, (12, 20))
    plain = Shift(shift.values, True, "a file")
    assert torch.allclose(spectrum_of(plain, (12, 20), lambda: WEIGHT).values, torch.linalg.svdvals(WEIGHT).double())
    # Kept since: the file alone is enough
    assert torch.allclose(spectrum_of(shift, (12, 20)).values, decompose(WEIGHT).sigma.double())
    with pytest.raises(KroneckerError, match="not the one that was trained"):
        other = Shift(shift.values, True, "a file", Origin("0" * 16, (0.0,) * 4))
        spectrum_of(other, (12, 20), lambda: WEIGHT)


def test_a_shifted_norm_has_one_number(no_kept_decompositions):
    elementwise = Shift(torch.tensor([3.0, 4.0]), True, "a file").scaled(2)
    assert spectrum_of(elementwise, (2,)).frobenius == 10
    weight = torch.tensor([0.6, 0.8])
    spectral = Shift(torch.tensor([0.5]), False, "a file")
    assert math.isclose(spectrum_of(spectral, (2,), lambda: weight).frobenius, 0.5, rel_tol=1e-6)
    assert math.isclose(spectral.delta(weight).norm().item(), 0.5, rel_tol=1e-6)


@pytest.mark.parametrize("name", ["kronecker", "kronecker of the paper's rows", "lora"])
def test_leaving_out_every_singular_pair_leaves_nothing_and_one_leaves_the_rest(name):
    change = CHANGES[name]
    U, s, V = torch.linalg.svd(change.A.double() if isinstance(change, Factors) else change.dense())
    first = (U[:, 1:3] * s[1:3]) @ V[1:3]
    expected = Factors(first, change.B, change.transposed_rows).dense() if isinstance(change, Factors) else first
    assert torch.allclose(without_singular_pair(change, 0).delta(WEIGHT), expected, atol=1e-5)
    parts = [change.delta(WEIGHT) - without_singular_pair(change, number).delta(WEIGHT) for number in range(3)]
    assert torch.allclose(sum(parts), change.delta(WEIGHT), atol=1e-5)
    assert without_singular_pair(change, 3) is change


# ---- places and heads ----


@pytest.mark.parametrize("architecture, heads", [("sd15", 8), ("sdxl", None)])
def test_every_attention_projection_has_its_place(architecture, heads):
    models = load_architecture(architecture)
    layers = {layer: None for layer in find_layers(models)}
    for layer, place in places_of(models, layers).items():
        words = layer.name.split(".")
        if "attn1" in words or "attn2" in words:
            assert place.kind == {"attn1": SELF, "attn2": CROSS}["attn1" if "attn1" in words else "attn2"]
            assert place.projection == words[words.index("attn1" if place.kind == SELF else "attn2") + 1][3:]
            assert place.site.stage == words[0].partition("_")[0]
            assert place.depth == int(words[words.index("transformer_blocks") + 1])
            assert place.site.attention == int(words[words.index("attentions") + 1])
            assert place.head_size == (layer.size[1 if place.projection == "out" else 0] // heads if heads else 64)
        elif words[-1].endswith("_proj") and "self_attn" in words:
            assert (place.kind, f"{place.projection}_proj") == (TEXT, words[-1])
            assert place.site.block == int(words[words.index("layers") + 1])
        else:
            assert place.kind == OTHER
    number = {"sd15": 16 + 12, "sdxl": 11 + 12 + 32}[architecture]
    assert len(sites_of(models)) == number


def test_sites_are_at_their_level():
    levels = {str(site): site.level for site in sites_of(load_architecture("sd15"))}
    assert levels["down 0.0"] == levels["up 3.2"] == 0 and levels["down 2.1"] == levels["up 1.0"] == 2
    assert levels["mid"] == 4


@pytest.mark.parametrize(
    "blocks, block, head, expected",
    [
        (4, 320, 64, ([1, 2, 3], [64, 128, 192, 256])),  # a row is 5 heads
        (4, 64, 64, ([1, 2, 3], [])),
        (8, 16, 64, ([4], [])),  # 4 rows are a head
        (4, 48, 64, ([], [])),  # neither
    ],
)
def test_heads_are_marked_where_blocks_fit_them(blocks, block, head, expected):
    assert boundaries(blocks, block, head) == expected


def test_heads_are_rows_of_q_and_columns_of_out():
    change = Factors(torch.randn(4, 8), torch.randn(32, 8))  # (128, 64), heads of 32 and of 8
    site = Site("unet", "mid")

    def entry(projection: str, head: int, of: Factors = change) -> Measured:
        return Measured(None, Place(site, SELF, projection, head), of, (128, 64), spectrum_of(of, (128, 64)), None)

    assert head_boundaries(entry("q", 32)) == {"A": ([1, 2, 3], []), "B": ([], [])}
    assert head_boundaries(entry("out", 16)) == {"A": ([], [2, 4, 6]), "B": ([], [])}
    assert head_words(entry("q", 32)) == "a row of A is a head"
    assert head_words(entry("q", 16)) == "a row of A is 2 whole heads"
    assert head_words(entry("out", 16)) == "2 columns of A are a head"
    assert "do not fit" in head_words(entry("q", 24)) and head_boundaries(entry("q", 24))["A"] == ([], [])
    rows = Factors(change.A, change.B, transposed_rows=True)
    assert head_boundaries(entry("q", 32, rows))["A"] == ([], []) and "every head" in head_words(entry("q", 32, rows))


# ---- timesteps, arguments ----


def test_the_share_explained_by_timestep_is_that_of_equally_many_rows():
    timesteps, nan = torch.tensor([900, 100, 300, 700]), torch.nan
    before = RowLosses(timesteps, torch.tensor([4.0, 1, 2, 3]), torch.full((4,), nan))
    after = RowLosses(timesteps, torch.tensor([2.0, 1, 1, 3]), torch.full((4,), nan))
    shares = explained_by_timestep(before, after, bins=2)
    assert [step for step, _ in shares] == [200, 800]
    assert [share for _, share in shares] == pytest.approx([1 - 2 / 3, 1 - 5 / 7])
    masked = [
        RowLosses(x.timesteps, x.whole, torch.tensor([nan, 2.0, nan, y])) for x, y in ((before, 4.0), (after, 1.0))
    ]
    assert explained_by_timestep(*masked, bins=2) == [(100, 0.0), (700, 0.75)]


def test_files_come_first_and_photos_make_it_more_than_files():
    assert split_arguments(["a", "b", "--output_dir", "c"]) == (["--adapter", "a", "b", "--output_dir", "c"], False)
    assert split_arguments(["a", "--output_dir", "c", "--keep=0.9"])[1]
    assert split_arguments(["a", "--class-noun", "dog"])[1] and split_arguments(["--help"])[1]
    assert not split_arguments(["a", "--pretrained_model_name_or_path", "b"])[1]


# ---- pruning ----


class Stand(SimpleNamespace):
    """A bench on which groups have a worth for the loss and one for the likeness, which add up."""

    def losses_with(self, adapter, layers):
        loss = 9.0 - sum(self.worth[layer] for layer in layers)
        return RowLosses(torch.tensor([1]), torch.tensor([loss]), torch.tensor([torch.nan]))

    def try_out(self, folder, adapter, layers):
        self.tried.append(len(layers))
        likeness = sum(self.likeness[layer] for layer in layers)
        return SimpleNamespace(added_likeness=likeness, losses=self.losses_with(adapter, layers))


@pytest.mark.parametrize("keep, left", [(1.0, 7), (0.9, 4), (0.5, 2), (0.3, 1), (0.01, 1)])
def test_the_smallest_that_holds_a_share_is_found_by_bisection(monkeypatch, tmp_path, keep, left):
    layers = {name: Factors(torch.ones(1, 1), torch.ones(1, 1)) for name in "abcdefgh"}
    worth = dict(zip(layers, (8, 7, 6, 5, 4, 3, 2, 1)))
    likeness = dict(zip(layers, (40, 30, 15, 8, 4, 2, 1, 0)))  # of 100 in all
    bench, written = Stand(worth=worth, likeness=likeness, tried=[]), {}
    monkeypatch.setattr(pruning, "groups_of", lambda adapter: {name: {name: layers[name]} for name in layers})
    monkeypatch.setattr(pruning, "write_part", lambda path, adapter, kept: written.update(kept))
    whole = bench.try_out("", None, layers)
    result = pruning.prune(bench, None, whole, keep, tmp_path / "pruned")
    assert [*written] == [*result.kept[::-1]] == [*layers][:left] and result.share >= keep
    assert sorted([*result.dropped, *result.kept]) == [*layers]
    assert len(bench.tried) <= 4
    with pytest.raises(UserError, match="--keep 0.9"):
        pruning.check_prunable(SimpleNamespace(added_likeness=-0.1), 0.9)
