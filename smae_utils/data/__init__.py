"""From files to batches: tasks and lists, readers, transforms, crops. Knows of the method its patches at most."""
