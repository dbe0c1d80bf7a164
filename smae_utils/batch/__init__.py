"""Many runs of notebooks from one YAML file: what is done stays done, what was stopped goes on."""
