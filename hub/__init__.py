"""Other people's file formats: checkpoints and LoRA adapters. Nothing here knows the method."""
