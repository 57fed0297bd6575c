"""The readers of all methods' files, for scripts that draw or merge."""

from dreambooth.drawing.pipelines import Reader
from dreambooth.kronecker import KroneckerReader
from methods.lora import LoraReader
from methods.words import WordReader

# LoRA first: peft's layers wrap plain ones only, and Kronecker layers fit inside peft's
READERS: tuple[Reader, ...] = (LoraReader(), KroneckerReader(), WordReader())
