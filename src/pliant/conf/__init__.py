"""What Hydra reads: ``base.yaml`` with every default, the recipes beside it, and shapes of known bases."""
