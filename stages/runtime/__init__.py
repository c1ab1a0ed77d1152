"""Running a stage: errors, logging, parameters, processes, scratch work. Nothing in this folder can affect results."""
