"""What an adapter file is, in words."""

from collections import Counter
from math import prod

from kron_formats.lora import numerical_rank
from kron_formats.matching import file_family
from kron_formats.names import FAMILY_NAMES
from kron_formats.reading import AdapterFile, Factors
from kron_formats.strangers import printable

PARTS = {
    "text encoder": ("lora_te_", "lora_te1_", "lycoris_text_model_", "text_encoder.", "text_model.", "encoder.layers.",
                     "text_encoders.clip_l.", "text_encoders.clip_h.", "clip_l.", "clip_h."),
    "second text encoder": ("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.", "clip_g."),
    "UNet": ("lora_unet_", "lycoris_", "unet.", "diffusion_model.", "down_blocks.", "mid_block.", "up_blocks.",
             "input_blocks.", "middle_block.", "output_blocks."),
}  # fmt: skip


def inspect(file: AdapterFile) -> str:
    """Return what a file is, for which model, its layers, factors, ranks, norms, metadata, and who can load it."""
    factors = {name: entry for name, entry in file.layers.items() if isinstance(entry, Factors)}
    made_for = file_family(file)
    lines = [
        f"{printable(str(file.path), longest=4096)}: {_kind(file)}",
        f"for: {FAMILY_NAMES[made_for] if made_for else 'an unknown base model'}",
        f"layers: {_layers(file)}",
        *([_factors(factors), _ranks(factors)] if factors else [_lora_ranks(file)]),
        _norms(file),
        *(f"metadata: {printable(key)} = {printable(value)}" for key, value in sorted(file.metadata.items())),
        *(f"loads in: {line}" for line in _clients(file, factors)),
    ]
    return "\n".join(lines)


def _is_kohya(file: AdapterFile) -> bool:
    return all(name.startswith(("lora_unet_", "lora_te")) for name in file.layers)


def _kind(file: AdapterFile) -> str:
    entries = file.layers.values()
    if not any(isinstance(entry, Factors) for entry in entries):
        return "a LoRA"
    if any(entry.transposed_rows for entry in entries):
        return "a Kronecker adapter with its rows in the order of the paper's code"
    names = "kohya's names" if _is_kohya(file) else "module paths as names"
    return f"a Kronecker adapter (LoKr) with {names}"


def _layers(file: AdapterFile) -> str:
    counts = Counter(
        next((part for part, starts in PARTS.items() if name.startswith(starts)), "other") for name in file.layers
    )
    parameters = sum(
        sum(tensor.numel() for tensor in vars(entry).values() if hasattr(tensor, "numel"))
        for entry in file.layers.values()
    )
    places = ", ".join(f"{count} in the {part}" for part, count in counts.items())
    return f"{len(file.layers)} ({places}), {parameters:,} parameters"


def _factors(factors: dict[str, Factors]) -> str:
    shapes = Counter(tuple(entry.A.shape) for entry in factors.values())
    return "factors (a1, a2): " + ", ".join(f"{shape} in {count} layers" for shape, count in shapes.most_common())


def _ranks(factors: dict[str, Factors]) -> str:
    from torch.linalg import svdvals

    ranks = []
    for entry in factors.values():
        whole = entry.multiplied()
        ranks.append(prod(numerical_rank(svdvals(factor), factor) for factor in (whole.A, whole.B)))
    return f"rank(A) · rank(B): {min(ranks)} to {max(ranks)}"


def _lora_ranks(file: AdapterFile) -> str:
    ranks = [entry.down.shape[0] for entry in file.layers.values()]
    return f"rank: {min(ranks)} to {max(ranks)}"


def _norms(file: AdapterFile) -> str:
    norms = {}
    for name, entry in file.layers.items():
        if isinstance(entry, Factors):
            whole = entry.multiplied()
            norms[name] = (whole.A.norm() * whole.B.norm()).item()  # |A ⊗ B| = |A| |B|
        elif entry.down.shape[0] ** 2 > prod(entry.size):
            norms[name] = entry.dense().norm().item()
        else:
            norms[name] = ((entry.up.t() @ entry.up) * (entry.down @ entry.down.t())).sum().clamp(min=0).sqrt().item()
    largest = max(norms, key=norms.get)
    zeros = sum(norm == 0 for norm in norms.values())
    untrained = f"; {zeros} layers are zero, as before training" if zeros else ""
    return f"norm of ΔW: {min(norms.values()):.3g} to {norms[largest]:.3g} (in {largest}){untrained}"


def _clients(file: AdapterFile, factors: dict[str, Factors]) -> list[str]:
    """Say which tools load the file as it is, and what to do for the others."""
    if not factors:
        if file.from_peft:
            return ["peft (PeftModel.from_pretrained)"]
        return ["diffusers (pipe.load_lora_weights), ComfyUI, A1111, Forge" + _a1111_hides(file)]
    if any(entry.transposed_rows for entry in factors.values()):
        return ["this project alone (load_kronecker); everything else: scripts/convert.py --to lora"]
    ours = ["this project (load_kronecker), and diffusers pipelines by attach_to_diffusers"]
    sides = {side for entry in factors.values() for side in entry.A.shape}
    square = len(sides) == 1 and all(min(entry.B.shape) >= max(sides) for entry in factors.values())
    if not _is_kohya(file):
        own_tool = "peft (PeftModel.from_pretrained)" if file.from_peft else "diffusers (load_lora_adapter)"
        return [*ours, *([own_tool] if square else []), "ComfyUI, A1111, Forge: scripts/convert.py --to native"]
    ours.append("ComfyUI, A1111, Forge" + _a1111_hides(file))
    if square and (file_family(file) != "sdxl" or any("_input_blocks_" in name for name in factors)):
        needs = "" if file.has_alphas else "; not without alphas: scripts/convert.py --to native adds them"
        ours.append(f"LyCORIS, sd-scripts (square A no larger than B{needs})")
    way = "diffusers, peft or lora" if square else "lora (as LoKr they take only a square A no larger than B)"
    return [*ours, f"diffusers and peft by themselves: scripts/convert.py --to {way}"]


def _a1111_hides(file: AdapterFile) -> str:
    notes = []
    if file_family(file) == "sdxl" and "ss_base_model_version" not in file.metadata:
        notes.append("A1111 hides SDXL files without ss_base_model_version, which scripts/convert.py writes")
    second = {name.rpartition("_self_attn_")[2] for name in file.layers if name.startswith("lora_te2_")}
    if second and second != {"q_proj", "k_proj", "v_proj", "out_proj"}:
        notes.append("A1111 skips the second text encoder, for it needs q, k, v and out together")
    return f" ({'; '.join(notes)})" if notes else ""
