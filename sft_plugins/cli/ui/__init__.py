"""What every command prints, draws and asks alike."""
