"""Run the training script's main() on one of several ranks, then write this rank's factors to FOLDER/rank-N.pt.

Started by a test:    accelerate launch ... rank_report.py FOLDER [FLAGS OF THE SCRIPT]
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import train_dreambooth_kronecker as script
from kron_adapter import inject_kronecker, kronecker_state_dict

folder = sys.argv.pop(1)
models = []


def remember(model, **options):
    models.append(model)
    return inject_kronecker(model, **options)


script.inject_kronecker = remember
script.main()
torch.save(kronecker_state_dict(models[-1]), f"{folder}/rank-{PartialState().process_index}.pt")
