"""What every command shares: settings, errors, signals, the run folder and the console."""
