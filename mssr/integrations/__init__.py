"""Our loss inside other trainers. Each module is for one of them, and is imported by whoever has it installed."""
