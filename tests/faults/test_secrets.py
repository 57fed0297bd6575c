"""Tokens and keys: nowhere in what a run writes or says, even where it fails."""

import os

from tests.faults import child

TOKEN, KEY = "hf_CanaryCanaryCanaryCanaryCanary0", "canary0123456789canary0123456789canary01"


def carry_key() -> None:
    os.environ["WANDB_API_KEY"] = KEY
    os.environ["WANDB_MODE"] = "offline"
    os.environ["WANDB_DIR"] = "."


def test_no_token_and_no_key_is_written_anywhere(start_run):
    run = start_run(
        "run", max_train_steps=2, push_to_hub=True, hub_model_id="a/b", hub_token=TOKEN, report_to="tensorboard"
    )
    code, said = run.run(carry_key)
    assert code == 0 and "--push_to_hub failed: " in said, "there is no Hub here"
    assert "hf auth login && hf upload a/b out ." in said
    assert run.run(child.after_step, 4, child.limit_file_size, 10_000, max_train_steps=4)[0] == 74
    written = [path for path in run.folder.rglob("*") if path.is_file()]
    assert {"config.yaml", "README.md", "log.txt", "training_state.json"} <= {path.name for path in written}
    for path in written:
        content = path.read_bytes()
        assert TOKEN.encode() not in content and KEY.encode() not in content, path
