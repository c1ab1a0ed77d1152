"""What stages read and write: file formats, schemas and their rules, work in shards, and models from the Hub."""
