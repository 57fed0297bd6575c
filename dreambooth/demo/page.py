"""The page of the demo, by Gradio, and its server, which gives out nothing but the page and what it draws.

Gradio is imported in the functions: it is an optional package.
"""

import importlib
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from dreambooth.demo.pair import GUIDANCE, MOST_STEPS, STRENGTHS, Drawing, Pair
from dreambooth.errors import UserError
from dreambooth.options.drawing import DemoOptions
from kron_formats.errors import KroneckerError

REQUIREMENTS = "scripts/demo-requirements.txt"
# The browser may load nothing from elsewhere, whatever Gradio's page asks for
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; connect-src 'self'; form-action 'self'"
)
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
STYLE = """
.gradio-container { width: 100% !important; max-width: 1180px !important; margin: 0 auto !important; }
.images { flex-wrap: nowrap !important; } .images > * { min-width: 0 !important; }
.images .image-frame, .images img { width: 100% !important; }
.images img { object-fit: contain !important; }
.images .empty { min-height: 140px; }
.strength label span { overflow-wrap: anywhere; }
"""


def import_gradio() -> Any:
    """Return the package, which will not call home. Raises UserError, with the pip command, if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise UserError(
            f"the demo needs Gradio, which is not installed: pip install --no-deps -r {REQUIREMENTS} ({error})"
        ) from error


def check_address(config: DemoOptions) -> None:
    """Raise UserError if nothing can listen on --host and --port."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        raise UserError(f"--host {config.host} --port {config.port} cannot be listened on: {error}") from error


def build_page(pair: Pair, names: Sequence[str], config: DemoOptions) -> Any:
    """Return the page, Gradio's Blocks. `names` are what it calls the adapters."""
    gradio = import_gradio()

    def draw(prompt, negative_prompt, seed, steps, guidance, *strengths):
        began = time.monotonic()
        try:
            before, after = pair.draw(Drawing(prompt, negative_prompt, seed, steps, guidance, strengths))
        except (UserError, KroneckerError) as error:
            raise gradio.Error(str(error), print_exception=False) from None
        return before, after, f"Seed {seed:g}, {time.monotonic() - began:.1f} s"

    with gradio.Blocks(title="Before and after", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown("# Before and after")
        with gradio.Row(elem_classes="images"):
            images = [
                _image(gradio, *words) for words in (("Before", "the base model"), ("After", "with the adapters"))
            ]
        said = gradio.Markdown()
        prompt = gradio.Textbox(config.prompt, label="Prompt", lines=2)
        negative_prompt = gradio.Textbox(config.negative_prompt, label="Negative prompt")
        strengths = [
            gradio.Slider(
                *STRENGTHS, value=adapter.scale, step=0.05, label=f"Strength of {name}", elem_classes="strength"
            )
            for name, adapter in zip(names, pair.adapters, strict=True)
        ]
        with gradio.Row():
            seed = gradio.Number(config.seed, label="Seed", precision=0, minimum=0, min_width=100)
            steps = gradio.Slider(1, MOST_STEPS, value=config.num_inference_steps, step=1, label="Steps")
            guidance = gradio.Slider(*GUIDANCE, value=config.guidance_scale, step=0.5, label="Guidance")
        button = gradio.Button("Draw", variant="primary")
        inputs = [prompt, negative_prompt, seed, steps, guidance, *strengths]
        gradio.on([button.click, prompt.submit], draw, inputs, [*images, said], api_name="draw")
    page.queue(default_concurrency_limit=1, api_open=False)  # one drawing at a time
    return page


def _image(gradio: Any, when: str, what: str) -> Any:
    """Return a place for an image below its heading."""
    with gradio.Column():
        gradio.Markdown(f"**{when}**: {what}")
        return gradio.Image(
            label=when,
            show_label=False,
            format="png",
            interactive=False,
            buttons=["download", "fullscreen"],
            alt_text=f"{when}: {what}",
        )


def build_server(page: Any, config: DemoOptions) -> Any:
    """Return a uvicorn server for the page, to `run()`.

    What the page does not need is refused: uploads, and all that is loaded from elsewhere.
    """
    gradio, fastapi = import_gradio(), importlib.import_module("fastapi")
    uvicorn = importlib.import_module("uvicorn")
    app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def guard(request, call_next):
        if request.method == "POST" and "upload" in request.url.path:
            return fastapi.Response("nothing is uploaded here", 403)
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = POLICY
        return response

    app = gradio.mount_gradio_app(
        app,
        page,
        path="",
        server_name=config.host,
        server_port=config.port,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        theme=gradio.themes.Base(**FONTS),
        css=STYLE,
    )
    return uvicorn.Server(uvicorn.Config(app, host=config.host, port=config.port, log_level="warning"))


def serve(pair: Pair, names: Sequence[str], config: DemoOptions) -> None:
    """Show the page until the program is stopped."""
    with tempfile.TemporaryDirectory(prefix="demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # images are kept there for an hour
        server = build_server(build_page(pair, names, config), config)
        print(f"http://{config.host}:{config.port} - Ctrl-C ends it", flush=True)
        server.run()
