"""Assets, the experiment's inputs, one stage each: generated from the seed, copied from disk, or fetched from the Hub."""
