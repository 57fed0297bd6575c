"""The table of contents of scripts/interpret.py."""

from collections.abc import Sequence
from pathlib import Path

import torch

from dreambooth.drawing.pipelines import adapted_tokenizers
from dreambooth.options.field import shared_options
from dreambooth.scoring.embeddings import load_evaluators
from dreambooth.scoring.inputs import Asked, Photos
from dreambooth.scoring.prompts import name_prompts, warn_of_cut_drawings, warn_of_cut_texts
from interpretation.ablation import ablate, check_ablations
from interpretation.adapters import Interpreted, read_interpreted
from interpretation.measuring import Portrait, measure, read_weights
from interpretation.options import FileOptions, InterpretationOptions
from interpretation.pruning import NAME, check_prunable, prune
from interpretation.report import Findings, write_interpretation
from interpretation.trials import Bench, set_up
from kron_formats.inspection import clients
from kron_formats.reading import read_adapter
from methods.readers import READERS

Inputs = tuple[Sequence[Asked], Photos]


def interpret(config: FileOptions | InterpretationOptions, inputs: Inputs | None) -> str:
    """Write what is found of the adapters; return what was found and written, in words.

    Raises UserError or KroneckerError, with nothing written, if an adapter, the base model or an evaluator is not one.
    """
    files = config.files if isinstance(config, InterpretationOptions) else config
    adapters = read_interpreted(files)
    if isinstance(config, InterpretationOptions):
        check_ablations(adapters)
    bench = None
    if isinstance(config, InterpretationOptions) and inputs:
        bench = _bench(config, inputs, adapters)
    weights = read_weights(files.base, adapters)
    portraits = [measure(adapter, weights) for adapter in adapters]
    del weights
    findings = _try_out(bench, adapters, portraits) if bench else Findings(portraits)
    written = write_interpretation(Path(config.output_dir), findings)
    return "\n".join([*_words(findings), f"Wrote {', '.join(map(str, written))} and plots"])


def _bench(config: InterpretationOptions, inputs: Inputs, adapters: Sequence[Interpreted]) -> Bench:
    asked, photos = inputs
    prompts = name_prompts(asked, [], [adapter.matched.file for adapter in adapters], config)
    warn_of_cut_drawings(prompts, adapted_tokenizers(config, []).values(), config)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    evaluators = load_evaluators(config.clip_model, config.dino_model, device)
    warn_of_cut_texts(prompts, evaluators)
    return set_up(READERS, prompts, photos, evaluators, device, config)


def _try_out(bench: Bench, adapters: Sequence[Interpreted], portraits: Sequence[Portrait]) -> Findings:
    config, several = bench.config, len(adapters) > 1
    prefixes = [f"{number} " if several else "" for number in range(1, len(adapters) + 1)]
    wholes = [bench.try_out(f"{x}whole", adapter, adapter.matched.layers) for x, adapter in zip(prefixes, adapters)]
    if config.keep is not None:
        check_prunable(wholes[0], config.keep)
    ablations = [
        ablate(bench, adapter, whole, config.pairs_of_a, prefix)
        for adapter, whole, prefix in zip(adapters, wholes, prefixes)
    ]
    photos = f"that were {'not ' if config.has_references else ''}trained on"
    pruned = None
    if config.keep is not None:
        pruned = prune(bench, adapters[0], wholes[0], config.keep, Path(config.output_dir) / NAME)
    return Findings(portraits, ablations, pruned, photos, shared_options(config))


def _words(findings: Findings) -> list[str]:
    lines = [f"{x.label}: {x.noun}, {len(x.layers)} layers, {x.parameters:,} parameters" for x in findings.portraits]
    for ablation in findings.ablations:
        lines += [f"{ablation.label}: {sentence}" for sentence in ablation.findings()]
    if pruned := findings.pruned:
        whole = findings.portraits[0]
        lines.append(
            f"{pruned.path}: {pruned.trial.parameters:,} of {whole.parameters:,} parameters, {len(pruned.layers)} of "
            f"{len(whole.layers)} layers, {pruned.bytes:,} bytes; it holds {pruned.share:.0%} of the likeness"
        )
        lines += [f"It loads in: {line}" for line in clients(read_adapter(pruned.path))]
    return lines
