"""Write a report on a sweep: its results as tables and files for other programs, plots, and one page to look at.

    python scripts/report.py outputs/sweeps/learning_rate
    python scripts/report.py outputs/sweeps/learning_rate --heatmap learning_rate shape --pictures subject learning_rate
    python scripts/report.py results.json --output_dir report

SWEEP is the folder that scripts/sweep.sh wrote. It may be half done: cells that failed or are not done are listed with
the reason. Or it is the results.json of an earlier report, which has all but pictures and curves. Nothing is trained or
scored here.

Writes into the sweep's folder, that of results.json, or --output_dir:

    report.html     everything on one page, with its pictures inside: opens without a network, on a phone too
    report.md       the same in Markdown, with plots/*.png
    results.csv     a line for each cell: its entries, state, scores, time, memory, parameters, command
    results.json    the same with every option, the versions, and the scores of each prompt
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0", "diffusers==0.42.1", "transformers==5.23.0", "accelerate==1.15.0", "peft==0.21.2",
#     "bitsandbytes==0.50.2", "safetensors==0.8.0", "datasets==5.2.0", "filelock==4.3.1", "psutil==7.2.2",
#     "numpy==2.4.6", "pillow==13.0.0", "PyYAML==6.0.3", "Jinja2==3.1.6", "matplotlib==3.11.2", "tqdm==4.70.1",
#     "tensorboard==2.21.0", "wandb==0.31.0",
# ]
# ///

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dreambooth.errors import readable_errors
from dreambooth.options.paths import check_folder, path_argument


def main() -> None:
    arguments = parse()
    output = arguments.output_dir or (arguments.sweep.parent if arguments.sweep.is_file() else arguments.sweep)
    check_folder(str(output), "--output_dir")

    from studies.report import Choice, write_report  # after the arguments, since numpy and Jinja2 take a moment

    choice = Choice(arguments.scores, arguments.over, arguments.heatmap, arguments.pictures)
    print("Wrote", *write_report(arguments.sweep, output, choice), f"and {output / 'plots'}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("sweep", type=path_argument, metavar="SWEEP", help="folder of the sweep, or results.json")
    parser.add_argument(
        "--output_dir", type=path_argument, metavar="DIR", help="folder for the report; default: that of SWEEP"
    )
    parser.add_argument(
        "--scores", nargs="+", metavar="SCORE", help="scores to plot, columns of results.csv; default: dino clip_t"
    )
    parser.add_argument(
        "--over", nargs="*", metavar="AXIS", help="axes to take means and spreads over; default: seed and subject"
    )
    parser.add_argument(
        "--heatmap",
        nargs=2,
        metavar=("X", "Y"),
        help="axes from left to right and from top to bottom; default: learning_rate and the next axis",
    )
    parser.add_argument(
        "--pictures",
        nargs=2,
        metavar=("ROWS", "COLUMNS"),
        help="axes of the grid of pictures, with sliders over all others; default: those of the heat map",
    )
    return parser.parse_args()


if __name__ == "__main__":
    with readable_errors():
        main()
