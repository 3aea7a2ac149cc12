"""What every other room uses: errors, files, locks, processes, timing."""
