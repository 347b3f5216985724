"""What is shown and handed in: the page of a run, the leaderboard, the competition's bundle."""
