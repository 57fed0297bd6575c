"""DreamBooth training, shared by the Stable Diffusion and the SDXL script; knows neither of them."""
