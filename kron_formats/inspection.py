"""What a file of any method is, in words."""

from collections import Counter
from collections.abc import Mapping
from math import prod

from torch.linalg import svdvals

from kron_formats.changes import Factors, LowRank, StoredFactors
from kron_formats.families import TEXT_ENCODER_TARGETS
from kron_formats.files import excerpt, printable
from kron_formats.lora import numerical_rank
from kron_formats.matching import file_family
from kron_formats.names import component_of, is_kohya
from kron_formats.reading import AdapterFile
from kron_formats.words import Word

PARTS = {"unet": "the UNet", "text_encoder": "the text encoder", "text_encoder_2": "the second text encoder"}


def inspect(file: AdapterFile) -> str:
    """Return what a file is, for which model, what it changes, its words, metadata, and what can load it."""
    made_for = file_family(file)
    lines = [
        f"{printable(str(file.path), longest=4096)}: {_kind(file)}",
        f"for: {made_for.title if made_for else 'an unknown base model'}",
        *([_layers(file)] if file.layers else []),
        *(_changes_of_weights(file) if file.needs_weights else _adapters(file) if file.layers else []),
        *(_word(word) for word in file.words),
        *(f"metadata: {excerpt(key)} = {excerpt(value)}" for key, value in sorted(file.metadata.items())),
        *(f"loads in: {line}" for line in clients(file)),
    ]
    return "\n".join(lines)


def _adapters(file: AdapterFile) -> list[str]:
    """Return factors, ranks and norms of what can stay beside the weights."""
    factors = {name: entry for name, entry in file.layers.items() if isinstance(entry, StoredFactors)}
    loras = {name: entry for name, entry in file.layers.items() if isinstance(entry, LowRank)}
    multiplied = {name: entry.multiplied() for name, entry in factors.items()}
    shapes = [_factors(factors), _ranks(multiplied)] if factors else [_lora_ranks(loras)]
    return [*shapes, _norms(multiplied, loras)]


def _changes_of_weights(file: AdapterFile) -> list[str]:
    return ["norm of ΔW: it depends on the base model's weights; scripts/convert.py --to lora measures it"]


def _word(word: Word) -> str:
    widths = ", ".join(f"{vectors.shape[1]} numbers for {PARTS[part]}" for part, vectors in word.vectors.items())
    return f"word: {printable(word.text)}, {word.count} {'vector' if word.count == 1 else 'vectors'} of {widths}"


def _in_second(name: str) -> bool:
    return is_kohya(name) and component_of(name) == "text_encoder_2"


def _is_kohya(file: AdapterFile) -> bool:
    return all(is_kohya(name) for name in file.layers)


def _kind(file: AdapterFile) -> str:
    if not file.is_kronecker:
        return file.noun
    if _has_transposed_rows(file):
        return "a Kronecker adapter with its rows in the order of the paper's code"
    names = "kohya's names" if _is_kohya(file) else "module paths as names"
    return f"a Kronecker adapter (LoKr) with {names}"


def _layers(file: AdapterFile) -> str:
    counts = Counter(component_of(name) for name in file.layers)
    parameters = sum(entry.numel() for entry in file.layers.values())
    places = ", ".join(f"{n} in {PARTS[part] if part else 'unknown places'}" for part, n in counts.items())
    return f"layers: {len(file.layers)} ({places}), {parameters:,} parameters"


def _has_transposed_rows(file: AdapterFile) -> bool:
    return any(isinstance(entry, StoredFactors) and entry.transposed_rows for entry in file.layers.values())


def _factors(factors: Mapping[str, StoredFactors]) -> str:
    shapes = Counter(tuple(entry.A.shape) for entry in factors.values())
    return "factors (a1, a2): " + ", ".join(f"{shape} in {count} layers" for shape, count in shapes.most_common())


def _ranks(factors: Mapping[str, Factors]) -> str:
    ranks = [prod(numerical_rank(svdvals(side), side) for side in (x.A, x.B)) for x in factors.values()]
    return f"rank(A) · rank(B): {min(ranks)} to {max(ranks)}"


def _lora_ranks(loras: Mapping[str, LowRank]) -> str:
    ranks = [entry.down.shape[0] for entry in loras.values()]
    return f"rank: {min(ranks)} to {max(ranks)}"


def _norms(factors: Mapping[str, Factors], loras: Mapping[str, LowRank]) -> str:
    norms = {name: (x.A.norm() * x.B.norm()).item() for name, x in factors.items()}  # |A ⊗ B| = |A| |B|
    norms |= {name: _lora_norm(entry) for name, entry in loras.items()}
    largest = max(norms, key=lambda name: norms[name])
    zeros = sum(norm == 0 for norm in norms.values())
    untrained = f"; {zeros} layers are zero, as before training" if zeros else ""
    return f"norm of ΔW: {min(norms.values()):.3g} to {norms[largest]:.3g} (in {largest}){untrained}"


def _lora_norm(lora: LowRank) -> float:
    if lora.down.shape[0] ** 2 > prod(lora.size):
        return lora.dense().norm().item()
    return ((lora.up.t() @ lora.up) * (lora.down @ lora.down.t())).sum().clamp(min=0).sqrt().item()


def clients(file: AdapterFile) -> list[str]:
    """Return which tools load the file as it is, and what to do for the others."""
    factors = {name: entry for name, entry in file.layers.items() if isinstance(entry, StoredFactors)}
    if file.needs_weights or file.words:
        return _clients_of_weights_and_words(file)
    if file.is_lora:
        if file.from_peft:
            return ["peft (PeftModel.from_pretrained)"]
        return ["diffusers (pipe.load_lora_weights), ComfyUI, A1111, Forge" + _a1111_hides(file)]
    if _has_transposed_rows(file):
        return ["this project alone (load_kronecker); everything else: scripts/convert.py --to lora"]
    ours = ["this project (load_kronecker), and diffusers pipelines by attach_to_diffusers"]
    sides = {side for entry in factors.values() for side in entry.A.shape}
    square = len(sides) == 1 and all(min(entry.B.shape) >= max(sides) for entry in factors.values())
    if not _is_kohya(file):
        own_tool = "peft (PeftModel.from_pretrained)" if file.from_peft else "diffusers (load_lora_adapter)"
        return [*ours, *([own_tool] if square else []), "ComfyUI, A1111, Forge: scripts/convert.py --to native"]
    ours.append("ComfyUI, A1111, Forge" + _a1111_hides(file))
    family = file_family(file)
    if square and (not (family and family.sgm_names) or any("_input_blocks_" in name for name in factors)):
        needs = "" if file.has_alphas else "; not without alphas: scripts/convert.py --to native adds them"
        ours.append(f"LyCORIS, sd-scripts (square A no larger than B{needs})")
    way = "diffusers, peft or lora" if square else "lora (as LoKr they take only a square A no larger than B)"
    return [*ours, f"diffusers and peft by themselves: scripts/convert.py --to {way}"]


def _clients_of_weights_and_words(file: AdapterFile) -> list[str]:
    ours = "this project (scripts/generate.py, evaluate.py and merge.py)"
    if not file.layers:
        alone = all([*word.vectors] == ["text_encoder"] for word in file.words)
        theirs = "diffusers (pipe.load_textual_inversion" + (")" if alone else ", once for each text encoder)")
        return [ours, theirs, "ComfyUI, A1111, Forge: in their embeddings folder, called by the file's name"]
    others = "everything else: scripts/convert.py --to fused, or --to lora --rank R for the nearest LoRA"
    if file.is_whole:
        return [ours, "diffusers (from_pretrained)", others]
    return [ours, others]


def _a1111_hides(file: AdapterFile) -> str:
    notes = []
    family = file_family(file)
    if family and family.a1111_needs_version and "ss_base_model_version" not in file.metadata:
        notes.append(f"A1111 hides {family.title} files without ss_base_model_version, which scripts/convert.py writes")
    second = {name.rpartition("_self_attn_")[2] for name in file.layers if _in_second(name)}
    if second and second != {*TEXT_ENCODER_TARGETS}:
        notes.append("A1111 skips the second text encoder, since it needs q, k, v and out together")
    return f" ({'; '.join(notes)})" if notes else ""
