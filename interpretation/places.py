"""Where layers are in a model: found by walking through the model that a file was matched with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from kron_formats.names import Layer

SELF, CROSS, TEXT, OTHER = "self", "cross", "text", "other"  # kinds; OTHER is what is in no attention
KINDS = (SELF, CROSS, TEXT, OTHER)
PROJECTIONS = ("q", "k", "v", "out")
UNET_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out"}
TEXT_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}


@dataclass(frozen=True)
class Site:
    """A spatial transformer of a UNet, or a layer of a text encoder; the rest of a block, and of a model."""

    component: str
    stage: str  # "down", "mid", "up" in a UNet; "text" in text encoders; "" outside all blocks
    block: int = 0  # number of the block in its stage, of the layer in a text encoder
    attention: int | None = None  # number of the transformer in its block; None for the rest of the block
    level: int = 0  # in a UNet, how far down it is: 0 has the most pixels, and "mid" the largest number

    def __str__(self) -> str:
        if self.stage == TEXT:
            return f"{self.component} {self.block}"
        if not self.stage:
            return f"{self.component}: rest"
        block = self.stage if self.stage == "mid" else f"{self.stage} {self.block}"
        if self.attention is None:
            return f"{block}: rest"
        return block if self.stage == "mid" else f"{block}.{self.attention}"


@dataclass(frozen=True)
class Place:
    """Where a layer is."""

    site: Site
    kind: str  # SELF, CROSS, TEXT or OTHER
    projection: str = ""  # "q", "k", "v" or "out"; "" in no attention
    head_size: int = 0  # features of one head; 0 in no attention
    depth: int = 0  # number of the transformer block at its site

    @property
    def column(self) -> str:
        """What the layer is at its site: "cross k"."""
        return f"{self.kind} {self.projection}".rstrip()

    @property
    def order(self) -> tuple[int, int]:
        """Where the column comes among others."""
        return KINDS.index(self.kind), ("", *PROJECTIONS).index(self.projection)

    @property
    def title(self) -> str:
        """Site and column: "down 1.0 cross k", with the number of the transformer block if it is not the first."""
        return f"{self.site} {self.column}" + (f" (block {self.depth})" if self.depth else "")


def places_of(models: Mapping[str, Any], layers: Mapping[Layer, Any]) -> dict[Layer, Place]:
    """Return where each layer is in the models that the layers were found in."""
    places: dict[nn.Module, Place] = {}
    for component, model in models.items():
        for module, place in _walk(component, model):
            places[module] = place  # later ones are more exact
    return {layer: places[layer.module] for layer in layers}


def sites_of(models: Mapping[str, Any]) -> list[Site]:
    """Return all attention sites of the models in the order of the computation."""
    walked = (place.site for name, model in models.items() for _, place in _walk(name, model) if place.kind != OTHER)
    return list(dict.fromkeys(walked))


def _walk(component: str, model: nn.Module) -> Iterator[tuple[nn.Module, Place]]:
    yield from ((module, Place(Site(component, ""), OTHER)) for module in model.modules())
    yield from _walk_unet(component, model) if component == "unet" else _walk_text_encoder(component, model)


def _walk_unet(component: str, unet: Any) -> Iterator[tuple[nn.Module, Place]]:
    depth = len(unet.down_blocks)
    for number, block in enumerate(unet.down_blocks):
        yield from _walk_block(Site(component, "down", number, level=number), block)
    if unet.mid_block is not None:
        yield from _walk_block(Site(component, "mid", level=depth), unet.mid_block)
    for number, block in enumerate(unet.up_blocks):
        yield from _walk_block(Site(component, "up", number, level=depth - 1 - number), block)


def _walk_block(rest: Site, block: Any) -> Iterator[tuple[nn.Module, Place]]:
    yield from ((module, Place(rest, OTHER)) for module in block.modules())
    for number, transformer in enumerate(getattr(block, "attentions", ())):
        yield from _walk_transformer(replace(rest, attention=number), transformer)


def _walk_transformer(site: Site, transformer: Any) -> Iterator[tuple[nn.Module, Place]]:
    yield from ((module, Place(site, OTHER)) for module in transformer.modules())
    for depth, block in enumerate(getattr(transformer, "transformer_blocks", ())):
        for attention in filter(None, (block.attn1, block.attn2)):
            kind = CROSS if attention.is_cross_attention else SELF
            for projection, name in UNET_PROJECTIONS.items():
                for module in getattr(attention, name).modules():
                    size = attention.inner_dim // attention.heads
                    yield module, Place(site, kind, projection, size, depth)


def _walk_text_encoder(component: str, encoder: nn.Module) -> Iterator[tuple[nn.Module, Place]]:
    layers = next((module for module in encoder.modules() if hasattr(module, "layers")), None)
    for number, layer in enumerate(getattr(layers, "layers", [])):
        site = Site(component, TEXT, number)
        yield from ((module, Place(site, OTHER)) for module in layer.modules())
        for projection, name in TEXT_PROJECTIONS.items():
            yield getattr(layer.self_attn, name), Place(site, TEXT, projection, layer.self_attn.head_dim)
