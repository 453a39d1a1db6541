"""Many runs from one configuration: what they are, what they share, how they are run, what came out."""
