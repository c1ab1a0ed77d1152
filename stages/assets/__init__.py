"""What the experiment starts from, one module per asset: made here from the seed, read from disk, or pinned on the Hub."""
