"""The main job on a real model: analyse, select, patch, fine-tune, compare, save, check."""
