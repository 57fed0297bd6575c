"""Scores of checkpoints, on photos that are not trained on, and of the photos that are."""

from dataclasses import dataclass

from dreambooth.options.field import option


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Scores of checkpoints and photos."""

    score_checkpoints: bool = option(
        "Have every checkpoint, and the result, denoise photos that are not trained on, those of holdout or of "
        "reference_dir, and keep the best in output_dir/best.",
        False,
        decides_result=False,
    )
    reference_dir: str | None = option(
        "Folder with other photos of the subject, for score_checkpoints instead of those of holdout.",
        None,
        decides_result=False,
        path=True,
        needs={"score_checkpoints": [True]},
    )
    score_photos: bool = option(
        "Before training, measure whether each photo fits its prompt, and warn of those that do not; after it, what "
        "was learned of each. Both are in photos.json and samples/index.html in output_dir. Takes the time of about "
        "16 training steps for each photo.",
        False,
        decides_result=False,
    )
