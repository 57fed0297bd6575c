"""Starting from the contrast of prompts: the directions, the layers that take them, the prompts, the refusals."""

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dreambooth.base_model.prompts import PromptStates
from dreambooth.data.dataset import class_prompts_of, prompts_of
from dreambooth.errors import UserError
from dreambooth.families.sd import SD
from dreambooth.families.sdxl import SDXL
from dreambooth.kronecker import KRONECKER
from dreambooth.method import Host
from dreambooth.options.checking import check_options
from dreambooth.options.kronecker import KroneckerOptions
from dreambooth.options.training import TrainingConfig, config_class
from dreambooth.tokens import tokens_read
from kron_adapter import KroneckerError, KroneckerLinear, contrast_rows, inject_kronecker, start_from_contrast
from toyworld.tiny_pipeline import HIDDEN_SIZE, build_pipeline, build_tokenizer
from train_dreambooth_kronecker import Config

KEYS_AND_VALUES = {"kron_targets": ["attn2.to_k", "attn2.to_v"], "kron_a1": 1, "kron_a2": HIDDEN_SIZE}
SUBJECT, CLASS = "a photo of sks dog", "a photo of dog"


def inputs(seed: int, count: int = 30, width: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) @ torch.randn(width, width, generator=generator)


def configure(**options) -> Config:
    required = {"pretrained_model_name_or_path": "base", "instance_data_dir": "photos", "instance_prompt": SUBJECT}
    return Config(**{**required, "kron_init": "contrast", "class_prompt": CLASS, **KEYS_AND_VALUES, **options})


def photo(prompt: str, class_prompt: str | None = CLASS) -> SimpleNamespace:
    return SimpleNamespace(prompt=prompt, class_prompt=class_prompt, folder="")


# ---- the directions ----


def test_the_directions_solve_the_generalised_eigenproblem():
    X, Y = inputs(0), inputs(1, count=50)
    C = Y.double().T @ Y.double() / 50
    C += 0.01 * C.diagonal().mean() * torch.eye(8)
    values, vectors = torch.linalg.eigh(C)
    whitening = vectors @ (values**-0.5).diag() @ vectors.T
    _, found = torch.linalg.eigh(whitening @ (X.double().T @ X.double()) @ whitening)
    expected = torch.nn.functional.normalize((whitening @ found.flip(1)[:, :3]).T)
    rows = contrast_rows(X, Y, 3)
    torch.testing.assert_close((torch.nn.functional.normalize(rows) * expected).sum(1).abs(), torch.ones(3).double())


@pytest.mark.parametrize("ridge", [0.01, 0.1])
def test_no_other_direction_has_a_higher_ratio(ridge):
    X, Y = inputs(2).double(), inputs(3, count=3).double()  # fewer than the width: only the ridge bounds the rest

    def ratio(a):
        floor = ridge * Y.square().mean() * a.square().sum(1)
        return (a @ X.T).square().mean(1) / ((a @ Y.T).square().mean(1) + floor)

    best = contrast_rows(X, Y, ridge=ridge)
    others = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near = best + 1e-3 * others
    assert ratio(best) > ratio(others).max() and ratio(best) >= ratio(near).max()


def test_the_answers_are_as_strong_as_the_inputs_and_rows_at_most_4_long():
    X, Y = inputs(4), inputs(5)
    rows = contrast_rows(X, Y, 8)
    strong = rows.norm(dim=1) < 3.99
    answers = (X.double() @ rows.T).square().mean(0).sqrt()
    torch.testing.assert_close(answers[strong], X.double().square().mean().sqrt().expand(int(strong.sum())))
    first, second = torch.eye(8)[:2]  # along the first feature the instance is faint and the class silent
    rows = contrast_rows(torch.stack([first * 0.08, second]), second[None])
    torch.testing.assert_close(rows, 4 * first[None].double())


def test_the_largest_entry_is_positive_and_the_bits_are_always_the_same():
    X, Y = inputs(6), inputs(7)
    rows = contrast_rows(X, Y, 4)
    assert rows.dtype == torch.float64 and all(row[row.abs().argmax()] > 0 for row in rows)
    assert torch.equal(contrast_rows(X.clone(), Y.clone(), 4), rows)
    assert torch.equal(contrast_rows(X.clone().requires_grad_(), Y, 4), rows)
    torch.testing.assert_close(contrast_rows(-X, Y, 4), rows)


def test_rows_are_no_more_than_the_inputs_have_directions():
    one = torch.tensor([[3.0, 4.0, 0.0]])
    (row,) = contrast_rows(one, torch.tensor([[0.0, 0.0, 1.0]]), 2)
    torch.testing.assert_close(row, torch.tensor([0.6, 0.8, 0.0]).double() / 3**0.5)
    assert len(contrast_rows(torch.cat([inputs(8, count=2)] * 5), inputs(9), 4)) == 2


@pytest.mark.parametrize(
    "instance, class_, problem",
    [
        (inputs(0), torch.zeros(4, 8), "zero"),
        (torch.zeros(4, 8), inputs(0), "no direction"),
        (inputs(0), inputs(0), "no direction"),
        (inputs(0) / 2, inputs(0), "no direction"),
        (inputs(0) * torch.nan, inputs(0), "not finite"),
        (inputs(0), inputs(0) * torch.inf, "not finite"),
    ],
)
def test_inputs_without_a_contrast_are_refused(instance, class_, problem):
    with pytest.raises(KroneckerError, match=problem):
        contrast_rows(instance, class_)


# ---- the layers ----


@pytest.mark.parametrize("a1", [1, 2, 4])
def test_a_layer_answers_to_the_instance_as_strongly_as_a_random_one(a1):
    X, Y, width = inputs(0, 60, 32), inputs(1, 60, 32), 32
    torch.manual_seed(0)
    layers = [KroneckerLinear(torch.nn.Linear(width, 16), a1, width) for _ in range(50)]
    answers = [(X @ (layer.gain * layer.A.detach()).T).square().mean() for layer in layers]
    start_from_contrast(layers[:1], X, Y)
    A = layers[0].gain * layers[0].A.detach()
    torch.testing.assert_close(A, a1**0.5 * contrast_rows(X, Y, a1).float())
    assert A.norm(dim=1).max() < 4 * a1**0.5
    answer = (X @ A.T).square().mean()
    torch.testing.assert_close(answer, X.square().mean() * a1)
    assert answer == pytest.approx(torch.stack(answers).mean().item(), rel=0.2)


def test_layers_of_several_sizes_take_what_they_have_room_for_and_the_rest_stays_random():
    instance, layers = inputs(0, count=2), [KroneckerLinear(torch.nn.Linear(8, 4), a1, 8) for a1 in (1, 4)]
    random, x = layers[1].A.detach().clone(), inputs(3)
    before = [layer.base(x) for layer in layers]
    start_from_contrast(layers, instance, inputs(1))
    rows = contrast_rows(instance, inputs(1), 2).float()
    torch.testing.assert_close(layers[0].A.detach(), rows[:1])
    torch.testing.assert_close(layers[1].A.detach()[:2], rows)  # √4 / gain = 1
    assert torch.equal(layers[1].A[2:], random[2:]) and not torch.equal(layers[1].A[:2], random[:2])
    assert all(torch.equal(layer(x), output) for layer, output in zip(layers, before))
    assert all(layer.A.requires_grad and layer.A.dtype == torch.float32 for layer in layers)


@pytest.mark.parametrize(
    "layer, problem",
    [
        (KroneckerLinear(torch.nn.Linear(8, 4), 1, 4, name="to_k"), "to_k has a2 = 4 and 8 input features"),
        (KroneckerLinear(torch.nn.Linear(16, 4), 1, 8, name="to_k"), "a2 = 8 and 16 input features.*to be 8"),
    ],
)
def test_a_layer_that_does_not_see_whole_inputs_is_refused_and_none_is_changed(layer, problem):
    good = KroneckerLinear(torch.nn.Linear(8, 4), 1, 8)
    before = good.A.detach().clone()
    with pytest.raises(KroneckerError, match=problem):
        start_from_contrast([good, layer], inputs(0), inputs(1))
    assert torch.equal(good.A, before)


def test_a_trained_layer_is_refused():
    layer = KroneckerLinear(torch.nn.Linear(8, 4), 1, 8, name="attn2.to_k")
    torch.nn.init.ones_(layer.B)
    with pytest.raises(KroneckerError, match="attn2.to_k is trained"):
        start_from_contrast([layer], inputs(0), inputs(1))


# ---- the prompts ----


def test_each_photo_s_prompt_counts_once():
    table = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    prompts, given = ["one", "two", "none"], ["two", "one", "two", "two"]
    states = PromptStates(
        lambda rows: {"prompt_embeds": table[rows]}, prompts, [given], [["none"]], SD, torch.device("cpu")
    )
    repeated = table[[prompts.index(prompt) for prompt in given]].flatten(0, 1)
    (found,) = states.of_instances()
    torch.testing.assert_close(found.T @ found / len(found), repeated.T @ repeated / len(repeated))
    assert torch.equal(states.of_class(), table[2])
    torch.testing.assert_close(
        contrast_rows(found, states.of_class(), 3), contrast_rows(repeated, states.of_class(), 3)
    )


PRIOR = {"with_prior_preservation": True}


@pytest.mark.parametrize(
    "options, class_photos, expected",
    [
        ({}, [], [CLASS]),
        ({**PRIOR, "class_data_dir": "class"}, [photo("a dog"), photo(CLASS), photo(CLASS)], ["a dog", CLASS, CLASS]),
        ({**PRIOR, "prior_source": "base_model"}, [], ["an animal", CLASS]),
    ],
    ids=["no prior", "class images", "base model"],
)
def test_the_class_is_what_its_rows_are_trained_with(options, class_photos, expected):
    photos = [photo("sks on a beach", "an animal"), photo(SUBJECT)]
    config = configure(**options)
    assert class_prompts_of(photos, class_photos, config) == [expected]
    encoded = prompts_of(photos, class_photos, config)
    assert encoded == list(dict.fromkeys(["sks on a beach", SUBJECT, *expected, ""]))


@pytest.mark.parametrize("family, kind", [(SD, "sd"), (SDXL, "sdxl")], ids=["sd", "sdxl"])
def test_only_keys_and_values_of_cross_attention_change_and_text_encoders_do_not(family, kind, caplog):
    pipeline, width = build_pipeline(kind), HIDDEN_SIZE * len(family.text_encoders)
    with torch.no_grad():
        embeddings = family.encode_prompts(pipeline, [SUBJECT, CLASS])
    states = PromptStates(
        lambda rows: {name: tensor[rows] for name, tensor in embeddings.items()},
        *([SUBJECT, CLASS], [[SUBJECT]], [[CLASS]], family, torch.device("cpu")),
    )
    options = {
        "kron_targets": ["to_q", "to_k", "to_v", "attn2.to_k", "attn2.to_v"],
        "kron_factors": [f"attn2.to_k=2,{width}", f"attn2.to_v=1,{width}", "to_q=1,64"],
        "train_text_encoder": True,
        "text_encoder_kron_a1": 1,
        "text_encoder_kron_a2": HIDDEN_SIZE,
        "kron_a1": 2,
        "kron_a2": 8,
    }
    starts = {}
    caplog.set_level("INFO")
    for init in ("invariant", "contrast"):
        models = family.trained_models(build_pipeline(kind).components, with_text=True)
        attached = KRONECKER.attach(Host(family, models, {}), configure(**options, kron_init=init), states)
        starts[init] = {
            (part, path): layer.gain * layer.A.detach()
            for part, layers in attached.layers.items()
            for path, layer in layers.items()
        }
    rows = contrast_rows(states.of_instances()[0], states.of_class(), 2).float()
    assert rows.shape == (2, width)
    ratio = (states.of_instances()[0] @ rows[0]).norm() / (states.of_class() @ rows[0]).norm()
    layers = sum(path.endswith(("attn2.to_k", "attn2.to_v")) for _, path in starts["contrast"])
    assert f"{layers} layers start with an A that answers {ratio:.1f} times" in caplog.text
    for (part, path), A in starts["contrast"].items():
        if path.endswith(("attn2.to_k", "attn2.to_v")):
            torch.testing.assert_close(A, len(A) ** 0.5 * rows[: len(A)])
        else:
            assert torch.equal(A, starts["invariant"][part, path])


def test_without_states_the_same_parameters_train():
    models = {"unet": build_pipeline("sd").unet}
    attached = KRONECKER.attach(Host(SD, models, {}), configure())
    assert sum(parameter.numel() for group in attached.groups for parameter in group.parameters) == 1_152


# ---- what is refused before weights are read ----


def check(photos, **options):
    with torch.device("meta"):
        unet = build_pipeline("sd").unet
    host = Host(SD, {"unet": unet}, {"text_encoder": build_tokenizer()})
    KRONECKER.check(host, photos, configure(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"kron_factors": ["attn2.to_k=1,32", "attn2.to_v=4,d_in/2"]},
        {"kron_targets": ["attn1.to_k", "attn2.to_q", "attn2.to_out.0"], "kron_a2": 32},
        {"kron_targets": ["attn2.to_k"], "kron_factors": ["attn2.to_k=4,32"]},
    ],
)
def test_no_layer_for_it_is_refused_with_the_flags_that_give_one(options):
    with pytest.raises(UserError, match="--kron_init contrast.*--kron_targets attn2.to_k attn2.to_v"):
        check([photo(SUBJECT)], **options)


@pytest.mark.parametrize(
    "targets, factors, shapes",
    [
        (["to_q", "to_k"], [], {"attn1.to_q": (4, 32), "attn1.to_k": (4, 32), "attn2.to_k": (1, 64)}),
        (["mid_block", "re:up.*attn1.to_q"], [], {"attn1.to_q": (4, 32), "attn2.to_k": (1, 64), "attn2.to_v": (1, 64)}),
        (["to_k"], ["to_k=8,8"], {"attn1.to_k": (8, 8), "attn2.to_k": (1, 64)}),
        (["attn2.to_k", "attn2.to_v"], ["attn2.to_v=2,d_in"], {"attn2.to_k": (1, 64), "attn2.to_v": (2, 64)}),
        (
            ["to_q", "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"],
            [],
            {"attn1.to_q": (4, 32), "mid_block.attentions.0.transformer_blocks.0.attn2.to_v": (1, 64)},
        ),
    ],
)
def test_layers_that_read_prompts_see_whole_states_unless_they_are_given_factors(targets, factors, shapes):
    config = configure(kron_targets=targets, kron_factors=factors, kron_a1=4, kron_a2=32)
    unet = build_pipeline("sd").unet
    layers = KRONECKER.attach(Host(SD, {"unet": unet}, {}), config).layers["unet"]
    for name, shape in shapes.items():
        found = {tuple(layer.A.shape) for path, layer in layers.items() if f".{path}".endswith(f".{name}")}
        assert found == {shape}, name
    assert replace(config, kron_init="invariant").contrast_factors() == {}


def test_one_kind_of_layer_is_enough():
    check([photo(SUBJECT)])
    check([photo(SUBJECT)], kron_targets=["to_q", "attn2.to_v"], kron_a1=4, kron_a2=8, kron_factors=["attn2.to_v=2,64"])


def test_prompts_that_read_like_the_class_s_are_refused_unless_a_photo_has_another():
    for prompt in (CLASS, "A photo  of DOG"):
        with pytest.raises(UserError, match="--class_prompt a photo of dog"):
            check([photo(prompt), photo(CLASS)])
    check([photo(CLASS), photo(SUBJECT)])
    cut = "a photo " * 20
    with pytest.raises(UserError, match="--class_prompt"):
        check([photo(f"{cut} of sks")], class_prompt=f"{cut} of dog")
    base = {**PRIOR, "prior_source": "base_model"}
    check([photo(CLASS, "an animal")], **base)
    with pytest.raises(UserError, match="--class_prompt"):
        check([photo("an animal", "an animal"), photo("an animal")], **base)


def test_tokens_read_are_those_of_all_tokenizers():
    tokenizers = [build_tokenizer(), build_tokenizer()]
    assert (
        tokens_read("a dog", tokenizers, 75)
        == tokens_read(" A DOG", tokenizers, 75)
        != tokens_read("a", tokenizers, 75)
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"class_prompt": None}, "^--kron_init contrast needs --class_prompt"),
        ({"class_prompt": ""}, "^--kron_init contrast needs --class_prompt"),
        ({"kron_init": "invariant"}, "^--class_prompt needs --with_prior_preservation"),
        ({"class_data_dir": "class"}, "^--class_data_dir needs --with_prior_preservation"),
        ({"class_prompt": None, "kron_init": "invariant", **PRIOR}, "^--with_prior_preservation needs --class_prompt"),
        ({"class_prompt": None, **PRIOR}, "needs --class_prompt"),
        ({**PRIOR}, "needs --class_data_dir"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        check_options(configure(**options))


@pytest.mark.parametrize("options", [{}, {**PRIOR, "prior_source": "base_model"}, {**PRIOR, "class_data_dir": "class"}])
def test_contrast_needs_no_prior_and_takes_any(options):
    check_options(configure(**options))


def test_the_order_of_the_groups_changes_no_rule():
    """Whichever group asks first, also those behind it are asked."""
    for groups in ((KroneckerOptions, TrainingConfig), (TrainingConfig, KroneckerOptions)):
        combined = functools.partial(
            config_class(*groups), pretrained_model_name_or_path="base", instance_prompt=SUBJECT
        )
        combined = functools.partial(combined, instance_data_dir="photos")
        for options in ({"kron_init": "contrast"}, {**PRIOR, "prior_source": "base_model"}):
            check_options(combined(**options, class_prompt=CLASS))
            with pytest.raises(UserError, match="needs --class_prompt"):
                check_options(combined(**options))
        with pytest.raises(UserError, match="^--class_prompt needs"):
            check_options(combined(class_prompt=CLASS))


def test_the_library_needs_no_training_suite():
    """As docs/adapter.md shows it."""
    pipeline = build_pipeline("sd")
    layers = inject_kronecker(pipeline.unet, 1, HIDDEN_SIZE, ["attn2.to_k", "attn2.to_v"])
    with torch.no_grad():
        subject, of_class = (pipeline.encode_prompt(text, "cpu", 1, False)[0][0] for text in (SUBJECT, CLASS))
    start_from_contrast(layers.values(), subject, of_class)
    assert all((layer.A > 0).gather(1, layer.A.abs().argmax(1, keepdim=True)).all() for layer in layers.values())
