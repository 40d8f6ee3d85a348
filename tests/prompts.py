"""Chat prompts of different lengths and kinds, for tests that compare two ways to compute the same answer."""

from __future__ import annotations

PROMPTS: list[str] = [
    "Who are you?",
    "What is the capital of France?",
    "Tell me a joke about penguins.",
    "Compute 17 + 25 and show each step.",
    "Write a haiku about the first snow in the mountains.",
    "List five things I should pack for a weekend of hiking, one per line.",
    "Übersetze bitte ins Englische: „Der Zug nach München fährt um 14:35 Uhr von Gleis 7 ab.“",
    "Write a Python function that returns the n-th Fibonacci number without recursion:\n"
    "\ndef fibonacci(n: int) -> int:\n"
    "    ...",
    "My grandmother turns 80 on 12 March 2024. 🎂 Help me write two warm sentences for her birthday card, please!",
    "Explain to a ten-year-old why the sky is blue during the day and red in the evening. Use an everyday comparison.",
    "What is the difference between a list and a tuple in Python? When would I use which one? Answer "
    "in one short paragraph and give one example of each.",
    "Rewrite this sentence so that it sounds polite: Send me the report right now, I have been "
    "waiting for three days and nobody in your team answers the phone.",
    'Here is a JSON document: {"name": "Ada", "born": 1815, "fields": ["mathematics", "computing"], '
    '"alive": false}. Which keys does it have, what type has the value of each of them, and how many '
    "elements does the longest array have?",
    "A shop sells apples at 3 for 2 dollars and pears at 75 cents each. I buy 12 apples and 8 pears "
    "and pay with a 20-dollar note. How much change do I get? Think step by step: first the price of "
    "the apples, then that of the pears, then the sum, then the change.",
    "Summarise the following text in one sentence. The lighthouse had stood on the cliff for two "
    "hundred years. Every evening the keeper climbed its 199 steps, lit the lamp and wrote the "
    "weather into a thick black book. When the lamp was replaced by an electric one, he kept climbing "
    "the stairs, because the book, he said, did not write itself.",
    "You are the librarian of a small town. A reader returns a novel three weeks late, with a coffee "
    "stain on page 42 and a pressed flower between the last two pages. She says that the book saved "
    "her winter. Write the short letter that the library sends her: it should mention the fee of "
    "$4.50, forgive half of it, ask about the flower, and recommend another book for the spring. Keep "
    "it under 120 words and end with a friendly greeting.",
    "I am planning a vegetable garden behind our house. The bed is 6 metres long and 1.2 metres wide, "
    "it gets the morning sun until about one o'clock, and the soil is heavy clay. Last year the "
    "tomatoes caught blight in August, the carrots were short and forked, and the slugs ate every "
    "single lettuce; only the beans and the garlic did well. We are two adults and two children, we "
    "like salads and soups, and we are away for the last two weeks of July. Please suggest what to "
    "plant where, in which month, and what to do about the soil and the slugs without using any "
    "poison.",
    "Read this conversation and say who is right, and why.\n"
    "\nAnna: If I toss a fair coin ten times and it comes up heads every time, then tails must be "
    "more likely on the next toss, because in the long run both have to come up equally often.\n"
    "Ben: No, the coin has no memory. The next toss is again one half for each side.\n"
    "Anna: But the law of large numbers says that the share of heads goes to one half. So the tails "
    "have to catch up!\n"
    "Ben: The share goes to one half because the first ten tosses drown in the thousands that follow, "
    "not because something makes up for them.\n"
    "Anna: That sounds like a trick with words. Ten heads too many stay ten heads too many.\n"
    "Ben: Exactly: the difference may even grow, and yet the share goes to one half.\n"
    "\nExplain your verdict with a small calculation for 10, 100 and 10,000 tosses.",
    "Please review this function. Name every bug that you find, say which input shows it, and give a "
    "corrected version.\n"
    "\n```python\n"
    "def moving_average(values, window=3):\n"
    "    result = []\n"
    "    total = 0\n"
    "    for i in range(0, len(values)):\n"
    "        total += values[i]\n"
    "        if i > window:\n"
    "            total -= values[i - window]\n"
    "        if i >= window - 1:\n"
    "            result.append(total // window)\n"
    "    return result\n"
    "\nassert moving_average([1, 2, 3, 4, 5]) == [2, 3, 4]\n"
    "assert moving_average([], 2) == []\n"
    "assert moving_average([1.5, 2.5], 1) == [1.5, 2.5]\n"
    "```\n"
    "\nThe function should return the mean of each group of `window` neighbouring values, from left "
    "to right, so the result has len(values) - window + 1 elements, or none if there are fewer values "
    "than that. A window smaller than 1 should raise a ValueError that names the value. The running "
    "time should stay linear in the number of values.",
    "Write a short story, about one page long, from these notes, and keep to the order in which they "
    "are given.\n"
    "\n1. It is the evening of 31 December 1999. In a small observatory in the Andes, at an altitude "
    "of 2,400 metres, three people are on duty: Inés, who has worked there for thirty years and will "
    "retire in the morning; Tom, a student from Leeds who arrived on Tuesday and still gets headaches "
    "from the thin air; and Father Joaquín, who is not an astronomer at all, but brings the bread up "
    "from the village every Friday and was caught by the snow.\n"
    "2. At half past nine the generator stops. Tom is afraid of the dark, which he has told nobody, "
    "because who would give a telescope to someone who is afraid of the dark? Inés lights a candle, "
    "and then, to save it, blows it out again.\n"
    "3. They open the dome by hand. It takes the three of them the better part of an hour, turning a "
    "crank that has not been used since 1974, while Father Joaquín sings to keep the rhythm. The sky "
    "that appears is so full that Tom forgets to be frightened. Inés shows him the two clouds of "
    "Magellan without any instrument, as she saw them as a girl from the roof of her parents' bakery."
    "\n4. Shortly before midnight a light moves across the slit: neither a plane nor a satellite, and "
    "it does not appear in any catalogue. They have no power to take a picture, so each of them draws "
    "what they see on the back of an envelope. The three drawings do not agree.\n"
    "5. In the morning the generator starts by itself. Inés leaves her key on the table, next to the "
    "drawings. Tom asks which of the three was right. She laughs, takes her bread and goes down into "
    "the valley.\n"
    "\nWrite it in the past tense and in the third person. Do not explain what the light was.",
]
