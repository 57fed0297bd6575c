"""scripts/demo.py: the page through its real HTTP API, on tiny models; what it cannot be asked for; what is refused."""

import json
import socket
import sys
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dreambooth.demo import page
from dreambooth.demo.pair import MOST_LETTERS, Drawing, Pair
from dreambooth.drawing.draw import draw_images
from dreambooth.drawing.pipelines import load_adapted_pipeline, load_pipeline_with, prepare_sampling, read_adapters
from dreambooth.errors import UserError
from kron_adapter import save_kronecker
from methods.readers import READERS
from scripts import convert, demo
from tests.adapters import adapted_pipeline
from tests.browser import browser, needs_chromium

SETTINGS = {"num_inference_steps": 1, "guidance_scale": 3.0, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def files(tiny_sd, tmp_path_factory):
    """A Kronecker adapter, and the same as a LoRA."""
    folder = tmp_path_factory.mktemp("adapters")
    pipeline = adapted_pipeline("sd", 4, 8, text=True, strength=0.1)
    dog, lora = folder / "dog.safetensors", folder / "lora.safetensors"
    save_kronecker({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}, dog)
    base = ["--pretrained_model_name_or_path", str(tiny_sd)]
    convert.main([str(dog), "--to", "lora", "--output", str(lora), *base])
    return dog, lora


def config_of(tiny_sd, *adapters, **options) -> demo.Config:
    return demo.Config(
        pretrained_model_name_or_path=str(tiny_sd), adapter=[str(path) for path in adapters], **SETTINGS, **options
    )


@pytest.fixture(scope="module")
def pair(tiny_sd, files) -> Pair:
    config = config_of(tiny_sd, *files)
    adapters = read_adapters(config, READERS)
    pipeline = load_pipeline_with(adapters, config, READERS)
    prepare_sampling(pipeline)
    return Pair(pipeline, adapters, READERS, config)


def expected(tiny_sd, adapters, seed) -> np.ndarray:
    """What a pipeline draws that was loaded anew with these adapters."""
    pipeline = load_adapted_pipeline(config_of(tiny_sd, *adapters), READERS)
    prepare_sampling(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    (image,) = draw_images(pipeline, [seed], 1, prompt="a dog", negative_prompt="", **SETTINGS)
    return np.asarray(image, int)


def drawing(**change) -> Drawing:
    values = {"prompt": "a dog", "negative_prompt": "", "seed": 3, "steps": 1, "guidance": 3.0, "strengths": (1.0, 0.5)}
    return Drawing(**values | change)


def test_strengths_change_from_drawing_to_drawing_and_leave_the_base_model_alone(pair, tiny_sd, files):
    dog, lora = files
    base, adapted = expected(tiny_sd, [], 3), expected(tiny_sd, [f"{dog}:0.5", f"{lora}:-0.8"], 3)
    assert np.abs(adapted - base).max() > 20
    for strengths, wanted in (((0.5, -0.8), adapted), ((1.0, 0.0), None), ((0.0, 0.0), base), ((0.5, -0.8), adapted)):
        before, after = (np.asarray(image, int) for image in pair.draw(drawing(strengths=strengths)))
        assert np.array_equal(before, base)
        if wanted is None:
            assert np.abs(after - base).max() > 20 and np.abs(after - adapted).max() > 20
        else:
            assert np.abs(after - wanted).max() <= 1


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prompt": "x" * (MOST_LETTERS + 1)}, "Prompt: .*2,000"),
        ({"negative_prompt": None}, "Negative prompt"),
        ({"seed": -1}, "Seed: .*0"),
        ({"seed": 2**60}, "Seed"),
        ({"steps": 1e6}, "Steps: .*1 to 150"),
        ({"steps": 2.5}, "Steps: choose a whole number"),
        ({"guidance": float("nan")}, "Guidance: .*1 to 20"),
        ({"strengths": (1.0, "1")}, "Strength: .*-1 to 2"),
        ({"strengths": (1.0,)}, "Strength: give 2"),
    ],
)
def test_what_is_out_of_range_is_refused_by_its_field(change, words, pair):
    with pytest.raises(UserError, match=words):
        pair.draw(drawing(**change))


# ---- the command line ----


def run(monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, flags)])
    demo.main()


def test_what_cannot_be_shown_is_refused_before_the_base_model_is_read(tiny_sd, files, tmp_path, monkeypatch, capsys):
    given = ["--pretrained_model_name_or_path", tiny_sd]
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, *given)
    assert end.value.code == 2 and "--adapter: name at least one" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install --no-deps -r scripts/demo-requirements.txt"):
        run(monkeypatch, *given, "--adapter", files[0])
    monkeypatch.setattr(page, "import_gradio", lambda: None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--host 127.0.0.1 --port {port} cannot be listened on"):
            run(monkeypatch, *given, "--adapter", files[0], "--port", port)
    word = tmp_path / "word.safetensors"
    width = adapted_pipeline("sd", 4, 8).text_encoder.config.hidden_size
    save_file({"<new>": torch.ones(1, width)}, word)
    monkeypatch.setattr("dreambooth.drawing.pipelines.load_pipeline_with", lambda *_: pytest.fail("read"))
    with pytest.raises(ValueError, match=f"{word.name} holds a new word, .*scripts/generate.py"):
        run(monkeypatch, *given, "--adapter", word, "--port", free_port())
    for flags, said in {
        ("--adapter", f"{files[0]}:5"): "Strength: ",
        ("--num_inference_steps", 999): "Steps: ",
    }.items():
        with pytest.raises(UserError, match=said):
            run(monkeypatch, *given, "--adapter", files[0], "--port", free_port(), *flags)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


# ---- the page ----


@pytest.fixture(scope="module")
def address(pair, tiny_sd, files, tmp_path_factory):
    """The page, served."""
    pytest.importorskip("gradio", reason="Gradio is optional: scripts/demo-requirements.txt")
    config = config_of(tiny_sd, *files, port=free_port(), prompt="a dog")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("images")))
    served = page.build_page(pair, ["dog", "lora"], config)
    server = page.build_server(served, config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://{config.host}:{config.port}"
    server.should_exit = True
    thread.join(20)
    monkeypatch.undo()


@pytest.fixture(scope="module")
def client(address, tmp_path_factory):
    from gradio_client import Client

    return Client(address, verbose=False, download_files=str(tmp_path_factory.mktemp("downloads")))


def test_the_page_draws_before_and_after(client, pair):
    before, after, said = client.predict("a dog", "", 3, 1, 3.0, 1.0, 0.5, api_name="/draw")
    wanted = pair.draw(drawing())
    for path, image in zip((before, after), wanted):
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(image))
    assert said.startswith("Seed 3,")


@needs_chromium
@pytest.mark.parametrize("width", [1280, 400])
def test_a_person_draws_in_a_browser(address, pair, width, tmp_path):
    images = "[...document.querySelectorAll('.images img')]"
    with browser(tmp_path) as tab:
        tab.open(address, width)
        tab.wait("document.querySelector('button.primary')")
        assert tab.value(images) == []
        tab.value("document.querySelector('button.primary').click()")
        tab.wait(f"{images}.length == 2 && {images}.every(image => image.complete && image.naturalWidth == 64)")
        assert tab.value(f"new Set({images}.map(image => image.src)).size") == 2
        assert tab.value(f"Math.max(...{images}.map(image => image.getBoundingClientRect().right))") <= width
        assert tab.overflow() <= 0
        tab.wait("document.body.innerText.includes('Seed 0,')")


def test_the_page_takes_numbers_and_prompts_and_neither_paths_nor_models(client, pair, monkeypatch):
    api = client.view_api(return_format="dict")
    assert [*api["named_endpoints"]] == ["/draw"] and not api["unnamed_endpoints"]
    parameters = api["named_endpoints"]["/draw"]["parameters"]
    assert [parameter["component"] for parameter in parameters] == ["Textbox"] * 2 + ["Number"] + ["Slider"] * 4
    with pytest.raises(Exception, match="Strength|Value"):
        client.predict("a dog", "", 3, 2, 3.0, 5.0, 1.0, api_name="/draw")
    asked, blank = [], (Image.new("RGB", (8, 8)),) * 2
    monkeypatch.setattr(pair, "draw", lambda drawing: asked.append(drawing) or blank)
    client.predict({"path": __file__}, "another/model", 3, 2, 3.0, 1.0, 1.0, api_name="/draw")
    (drawing,) = asked
    assert isinstance(drawing.prompt, str) and drawing.prompt.startswith("{")  # a prompt like any other
    assert drawing.negative_prompt == "another/model" and drawing.strengths == (1.0, 1.0)


def status(request) -> int:
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_server_gives_out_no_files_and_takes_none(address, files):
    for path in (files[0], demo.__file__, "README.md", "scripts/demo.py"):
        assert status(f"{address}/gradio_api/file={path}") in (403, 404)
    upload = urllib.request.Request(f"{address}/gradio_api/upload", data=b"x", method="POST")
    assert status(upload) == 403


def test_nothing_is_loaded_from_elsewhere(address):
    with urllib.request.urlopen(address, timeout=20) as response:
        policy, text = response.headers["Content-Security-Policy"], response.read().decode()
    assert "default-src 'self' data: blob:" in policy and "http" not in policy and "*" not in policy
    assert "fonts.googleapis" not in text
    with urllib.request.urlopen(f"{address}/config", timeout=20) as response:
        config = json.load(response)
    assert not config["analytics_enabled"] and not config.get("space_id")
    assert config["enable_queue"] and not config.get("is_colab")


def test_drawings_wait_for_each_other(client, pair, monkeypatch):
    drawing_now, most = [], []

    def draw(_):
        drawing_now.append(1)
        most.append(len(drawing_now))
        time.sleep(0.2)
        drawing_now.pop()
        return Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8))

    monkeypatch.setattr(pair, "draw", draw)
    jobs = [client.submit("a dog", "", n, 2, 3.0, 1.0, 0.5, api_name="/draw") for n in range(3)]
    assert [job.result()[2][:6] for job in jobs] == ["Seed 0", "Seed 1", "Seed 2"] and most == [1, 1, 1]
