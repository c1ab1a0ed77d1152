"""Assets, the experiment's inputs, one stage each: made here from the seed, copied from disk, or fetched from the Hub."""
