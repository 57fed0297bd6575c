"""Every option of every script: one declaration per flag, one group per topic, one parser. Does not import torch."""
