"""Run the training script's main() on one of several ranks, then write to FOLDER/rank-N.pt what this rank ends with.

That is its factors, and the share of the frozen weights that it has.

Started by a test:    accelerate launch ... rank_report.py FOLDER [FLAGS OF THE SCRIPT]
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_dreambooth_kronecker as script
from dreambooth.kronecker import Kronecker

folder = sys.argv.pop(1)
attach, attached = Kronecker.attach, []


def remember(*arguments):
    attached.append(attach(*arguments))
    return attached[-1]


Kronecker.attach = remember
script.main()
trained = attached[-1]  # the ones before have no weights: `check` attaches too
state = {f"{name}.{key}": factor for name, part in trained.state().items() for key, factor in part.items()}
frozen = [weight for model in trained.host.models.values() for weight in model.parameters() if not weight.requires_grad]
kept = sum((weight.to_local() if isinstance(weight, DTensor) else weight).numel() for weight in frozen)
report = {"factors": state, "share": kept / sum(weight.numel() for weight in frozen)}
torch.save(report, f"{folder}/rank-{PartialState().process_index}.pt")
