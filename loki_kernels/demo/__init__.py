"""The main job on a real model, beside full fine-tuning and LoRA: what is learned and forgotten."""
