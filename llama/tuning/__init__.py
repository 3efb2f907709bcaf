"""Soft prompts: learned on the sharded model, kept as PEFT adapters."""
