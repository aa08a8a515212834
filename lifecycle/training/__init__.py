"""The training loop, objectives, adapters (PEFT methods) and checkpoints."""
