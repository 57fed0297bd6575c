"""The readers of all methods' files, for the scripts that draw and merge."""

from dreambooth.drawing.pipelines import Reader
from dreambooth.kronecker import KroneckerReader
from methods.lora import LoraReader

# LoRAs first: peft's layers go around plain ones, and Kronecker layers into peft's
READERS: tuple[Reader, ...] = (LoraReader(), KroneckerReader())
