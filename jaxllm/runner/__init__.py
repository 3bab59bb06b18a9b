"""The jitted steps: what turns a plan of the scheduler into tokens."""
