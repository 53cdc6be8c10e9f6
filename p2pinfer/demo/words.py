"""The words and sentence templates that the story grammar draws from.

A name in braces is a field that :class:`p2pinfer.demo.stories.Story` fills in: ``hero`` and
``friend`` are names, ``he``, ``him``, ``his`` and ``himself`` follow the hero, the same with an
``f`` in front follow the friend, and a capital first letter gives the form that begins a sentence.
"""

from __future__ import annotations


def listed(text: str) -> tuple[str, ...]:
    """Split a comma-separated list of words."""
    return tuple(text.split(","))


GIRLS = listed(
    "Mia,Anna,Lily,Emma,Sara,Lucy,Nora,Clara,Ruby,Alice,Hannah,Zoe,Maya,Julia,Leila,Amina,Kate,"
    "Grace,Daisy,Lena"
)
BOYS = listed(
    "Tom,Ben,Leo,Max,Sam,Jack,Oliver,Henry,Noah,Finn,Paul,David,Omar,Felix,Theo,Hugo,Peter,Emil,"
    "Kofi,Ravi"
)
SHE_ANIMALS = listed("Hazel,Willow,Poppy,Luna,Misty,Pearl,Berry,Olive,Penny,Fern,Nutmeg")
HE_ANIMALS = listed("Pip,Bruno,Rusty,Moss,Otto,Basil,Teddy,Barley,Monty,Milo,Oscar")
ANIMALS = listed(
    "fox,rabbit,bear,mouse,hedgehog,squirrel,cat,dog,goat,deer,badger,pony,mole,lamb,raccoon,"
    "hamster,kitten,puppy,donkey,pig"
)

TRAITS = listed(
    "little,kind,brave,curious,clever,cheerful,friendly,shy,small,gentle,funny,young,quiet,happy,"
    "playful,busy"
)
COLOURS = listed("red,blue,green,yellow,golden,silver,white,purple,orange,brown,shiny,tiny")
THINGS = listed(
    "ball,kite,scarf,bell,box,boat,key,hat,drum,lamp,flute,compass,button,ribbon,book,cup,map,ring,"
    "whistle,blanket,marble,basket,umbrella,feather"
)
WEATHER = listed("sunny,rainy,windy,cold,warm,cloudy,snowy,foggy,bright,frosty,stormy,quiet")
TIMES = ("morning", "morning", "afternoon", "day", "evening")
SNACKS = listed(
    "bread,cheese,apples,cookies,berries,nuts,cake,pancakes,plums,carrots,pears,honey cakes"
)

PLACES = (
    ("in the forest", "the forest"),
    ("by the river", "the river"),
    ("in the village", "the village"),
    ("near the lake", "the lake"),
    ("on the farm", "the farm"),
    ("at the foot of the mountain", "the mountain"),
    ("in the valley", "the valley"),
    ("by the sea", "the sea"),
    ("on the green hill", "the green hill"),
    ("near the old mill", "the old mill"),
    ("in the meadow", "the meadow"),
    ("by the pond", "the pond"),
    ("near the harbor", "the harbor"),
    ("behind the old castle", "the old castle"),
    ("at the edge of the woods", "the edge of the woods"),
    ("near the stone bridge", "the stone bridge"),
)
SPOTS = listed(
    "a big stone,an old bench,a fallen tree,the garden wall,a wooden fence,an empty barrel,"
    "a pile of leaves,an old cart"
)
ELDERS = (
    ("Grandmother", "she"),
    ("Grandfather", "he"),
    ("Aunt Rose", "she"),
    ("Uncle George", "he"),
    ("old Mrs. Miller", "she"),
    ("old Mr. Hill", "he"),
)
HOBBIES = (
    "to sing",
    "to dance",
    "to climb trees",
    "to read books",
    "to paint pictures",
    "to count the stars",
    "to collect stones",
    "to pick flowers",
    "to play hide and seek",
    "to listen to the birds",
    "to jump over puddles",
    "to tell jokes",
    "to bake cakes",
    "to watch the clouds",
)
SKIES = (
    "the sky was pink and gold",
    "the stars were shining",
    "the moon was round and bright",
    "the air smelled of flowers",
    "the birds were singing again",
    "everything was fresh and clean",
)

OPENINGS = (
    "Once upon a time, there was {a_trait} {kind} named {hero} who lived {at}.",
    "Once upon a time, {a_trait} {kind} named {hero} lived {at}.",
    "Once upon a time, in a house {at}, there lived {a_trait} {kind}. {His} name was {hero}.",
    "Once upon a time there was {a_kind} called {hero} who loved {hobby}.",
    "Long ago, {a_trait} {kind} named {hero} lived {at}.",
    "Long, long ago, there was {a_trait} {kind} {at}. Everyone called {him} {hero}.",
    "The {trait} {kind} lived {at}. {His} name was {hero}, and {he} loved {hobby}.",
    "The little {kind} was called {hero}, and {he} lived all alone {at}.",
    "There once was {a_trait} {kind} named {hero} who loved {hobby}.",
    "{Hero} was {a_trait} {kind} who lived {at}.",
    "{Hero} was {a_trait} {kind}. {He} lived {at} with {his} family.",
    "{A_kind} named {hero} lived {at}, not far from {place2}.",
    (
        "One {weather} morning, {hero} woke up and looked out of the window. {He} was {a_trait} "
        "{kind}."
    ),
    "One morning, {hero} woke up early and ran outside. {He} was {a_trait} {kind} who lived {at}.",
    "One day, {hero} was walking {at}. {He} was {a_trait} {kind}.",
    "It was {a_weather} morning {at}. {Hero}, {a_trait} {kind}, was ready for a new day.",
    (
        "Early one morning, when the sun came up over {place}, {hero} was already awake. {He} "
        "was {a_trait} {kind}."
    ),
    "In a small house {at} lived {a_trait} {kind} named {hero}.",
    "Far away, {at}, there lived {a_trait} {kind} named {hero}.",
    "Everyone {at} knew {hero}, the {trait} {kind}.",
    "Do you know the story of {hero}? {He} was {a_trait} {kind} who lived {at}.",
    '"What a {weather} {time}!" said {hero}. {He} was {a_trait} {kind} who lived {at}.',
    "This is the story of {a_trait} {kind} named {hero}, who lived {at}.",
    "When {hero} was a very small {kind}, {he} lived {at} with {elder}.",
)
DETAILS = (
    "{He} loved {hobby} more than anything else.",
    "Every day {he} went out {hobby}.",
    "{He} had many friends, and all of them liked {him}.",
    "In the mornings {he} helped {elder}, and in the afternoons {he} went out to play.",
    "{He} lived in a tiny house with a round green door.",
    "For breakfast {he} always ate {snack} with a glass of milk.",
    "{He} was not very big, but {he} had a big heart.",
    "{Elder} lived next door and told {him} stories every evening.",
    "From {his} window {he} could see all the way to {place2}.",
    "People said that nobody laughed as loudly as {hero}.",
)
GREETINGS = (
    '"Hello," said {friend}. "What are you doing?"',
    '"Good day!" said {friend}. "What is the matter?"',
    '"Why are you in such a hurry?" asked {friend}.',
    '"Hello there," said {friend}. "Can I help you?"',
    '"You look as if you need a friend," said {friend}.',
)
OFFERS = (
    '"Do not worry," said {friend}. "We will look for it together."',
    '"Four eyes see more than two," said {friend}. "Let us go!"',
    '"I think I saw it near {place2}," said {friend}. "Come with me!"',
    '{Friend} nodded. "When did you have it last?" {fhe} asked. "Near {place2}," said {hero}.',
)
SEARCHES = (
    "{He} looked under the bed, behind the door, and even inside the oven.",
    "{He} searched the whole house from top to bottom, but there was no {noun}.",
    "{He} asked {elder}, but {ehe} had not seen it.",
    "{He} looked here, and {he} looked there, but {he} found only {a_gift}.",
)
SADNESS = (
    "{Hero} sat down on {spot} and began to cry.",
    "A big tear rolled down {his} face.",
    "{Hero} felt very sad.",
    "{He} did not even want to eat {his} {snack}.",
)
TRAVELS = (
    "It was a long way, but they sang songs and the time passed quickly.",
    "The road was full of stones, and the wind blew from all sides.",
    "On both sides of the path, flowers were growing in every color.",
    "Above them, {sky}.",
    "A butterfly flew in front of them as if it knew the way.",
)
COMFORTS = (
    '"Do not be afraid," said {hero}. "I will help you."',
    '"Hold on!" called {hero}. "I am coming!"',
    '"How did that happen?" asked {hero}. "I was not careful," said {friend}.',
    '"Stay calm," said {hero}. "We will find a way."',
)
TROUBLES = (
    (
        "One of {fhis} feet was stuck between two heavy stones.",
        (
            "{He} found a long stick, put it under one stone, and pushed with all {his} strength. "
            "The stone moved, and {friend} was free."
        ),
    ),
    (
        "{Fhe} had fallen into a deep hole and could not get out.",
        (
            "{He} took a long rope, tied it to a tree, and let it down into the hole. Slowly, "
            "{friend} climbed up into the light."
        ),
    ),
    (
        "{Fhe} was sitting on a rock in the middle of the wild water and could not get back.",
        (
            "{He} pushed a fallen tree into the water, and it made a bridge. Step by step, "
            "{friend} came across."
        ),
    ),
    (
        "{Fhe} was lost and did not know the way home.",
        (
            "{He} climbed the tallest tree and looked around until {he} saw a little house with "
            'smoke coming out of the chimney. "That is my home!" said {friend}, and they went '
            "there together."
        ),
    ),
    (
        "{Fhe} was caught in a net and could not move.",
        (
            "{He} pulled at the net, one knot after the other, until the last one was open and "
            "{friend} could move again."
        ),
    ),
    (
        "{Fhe} had hurt {fhis} foot and could not walk.",
        (
            "{He} washed the foot with cool water, put a soft leaf around it, and helped {friend} "
            "all the way home."
        ),
    ),
    (
        "{Fhe} had not eaten for two days and was very hungry.",
        (
            "{He} opened {his} bag and gave {friend} all of {his} {snack}. {Friend} ate until not "
            "a crumb was left."
        ),
    ),
)
STORMS = (
    "Suddenly the sky turned dark, and it began to rain.",
    "All at once, thunder rolled over the hills, and big drops fell from the sky.",
    "But then a strong wind came up and blew the leaves through the air.",
    "After an hour, snow began to fall, and soon they could not see the path anymore.",
    "Then thick fog came down, and everything around them turned gray.",
)
SHELTERS = listed(
    "a small cave,an empty barn,a hollow tree,an old hut,a little chapel,a boat house,a tall tower"
)
PROJECTS = (
    (
        "a big cake",
        "flour",
        "at the old windmill",
        (
            "Then they mixed the flour with eggs, milk, and sugar and put the cake into the oven. "
            "Soon the whole house smelled sweet."
        ),
    ),
    (
        "a warm soup",
        "salt",
        "at the market",
        (
            "They cut the vegetables, added the salt, and let the soup cook for an hour. It was "
            "just right."
        ),
    ),
    (
        "a wooden chair",
        "wood",
        "in the forest",
        (
            "They cut the wood, rubbed it until it was smooth, and put the four legs in place. The "
            "chair did not shake at all."
        ),
    ),
    (
        "a picture",
        "blue paint",
        "in the shop by the church",
        "They painted a wide blue sky, a house with a red roof, and a smiling sun above it.",
    ),
    (
        "a warm blanket",
        "wool",
        "on the sheep farm",
        "Day after day they worked with the soft wool, until the blanket was as big as a bed.",
    ),
    (
        "a crown of flowers",
        "long grass",
        "behind the pond",
        (
            "With the grass they tied the flowers together, a white one, a yellow one, and a blue "
            "one, until the crown was round and full."
        ),
    ),
    (
        "apple pie",
        "honey",
        "near the old oak tree, where the bees live",
        (
            "They cut the apples into thin slices, poured the honey over them, and baked the pie "
            "until it was golden brown."
        ),
    ),
)
FEARS = (
    (
        "the dark",
        "That night, they went outside without a lamp.",
        (
            "After a while {he} saw the stars, thousands of them, and the dark was not so dark "
            "anymore."
        ),
    ),
    (
        "deep water",
        "They went to the lake, and {hero} put one foot into the water, and then the other.",
        "Soon the water carried {him}, and {he} was swimming all by {himself}.",
    ),
    (
        "high places",
        "They went to the old tower and climbed the stairs, one after the other.",
        "At the top {he} opened {his} eyes and saw the whole land, as small and pretty as a toy.",
    ),
    (
        "thunder",
        "When the next storm came, they sat at the window and counted after every flash of light.",
        (
            "With every number the thunder was farther away, and at last {he} even clapped {his} "
            "hands."
        ),
    ),
    (
        "singing in front of others",
        "At the summer party, they went up on the little stage and began to sing.",
        (
            "At first {his} voice was very soft, but it grew stronger, and in the end everyone "
            "cheered."
        ),
    ),
    (
        "crossing the long bridge",
        "They went to the bridge and took one step, and then another one.",
        "{He} looked straight ahead, counted to fifty, and all at once {he} was on the other side.",
    ),
)
GOALS = (
    (
        "the wide blue sea",
        (
            "In front of them was nothing but water, blue and endless, and the waves were dancing "
            "in the light."
        ),
    ),
    (
        "the highest mountain",
        "The mountain stood before them, white with snow, and its top touched the clouds.",
    ),
    (
        "the great waterfall",
        "The water fell from the rocks with a mighty roar, and a rainbow was hanging in the air.",
    ),
    (
        "the big city",
        "There were towers, bridges, and a thousand lights, and music came from every window.",
    ),
    (
        "the field of sunflowers",
        "Thousands of yellow flowers turned their faces to the sun, as far as they could see.",
    ),
    (
        "the lighthouse on the cliff",
        (
            "The tall white lighthouse sent its beam over the water, around and around, like a "
            "slow bright wing."
        ),
    ),
    (
        "the northern lights",
        "Green and purple lights were moving across the sky like curtains in the wind.",
    ),
)
PLANTS = (
    ("apple tree", "red apples"),
    ("cherry tree", "sweet cherries"),
    ("pumpkin plant", "round pumpkins"),
    ("rose bush", "white roses"),
    ("pear tree", "juicy pears"),
    ("berry bush", "blue berries"),
    ("tomato plant", "ripe tomatoes"),
    ("plum tree", "dark plums"),
)
NOISES = (
    (
        "tap, tap, tap",
        "It was only {a_fkind} named {friend}, who was fixing the roof of {fhis} house.",
    ),
    ("hoo, hoo", "{A_ftrait} {fkind} named {friend} was blowing into an empty bottle."),
    (
        "crunch, crunch",
        "{A_ftrait} {fkind} named {friend} was sitting there in the dry leaves and eating nuts.",
    ),
    ("splash, splash", "In the water barrel {a_fkind} named {friend} was taking a bath."),
    (
        "boom, boom",
        (
            "{A_ftrait} {fkind} named {friend} was playing on a big drum, because {fhe} could "
            "not sleep."
        ),
    ),
    (
        "sniff, sniff",
        (
            "Under the tree, {a_ftrait} {fkind} named {friend} was crying, because {fhe} had "
            "nobody to talk to."
        ),
    ),
)
EVENINGS_ALONE = (
    "That evening, {hero} sat at the window and looked out. {Sky}.",
    "When {he} went to bed that night, {hero} was tired and happy.",
    "In the evening, {hero} told {elder} all about it.",
    "That night, {hero} slept better than ever before.",
)
EVENINGS_TOGETHER = (
    *EVENINGS_ALONE,
    "In the evening, {hero} and {friend} sat on {spot} and ate {snack}. {Sky}.",
    "On the way home, {hero} and {friend} sang a song, and {sky}.",
    "Later, {elder} made {snack} for both of them, and they ate until they were full.",
    "When it was time to go home, {hero} waved to {friend} for a long time.",
)
ENDINGS_ALONE = (
    "It had been a good day.",
    "And if you ever come to {place}, you may still hear people talk about {hero}.",
    "And {hero} lived happily ever after.",
    "From that day on, {hero} knew that even the small ones can do great things.",
    "And that is the end of the story.",
    "{He} smiled, closed {his} eyes, and dreamed of the next adventure.",
)
ENDINGS_TOGETHER = (
    *ENDINGS_ALONE,
    "From that day on, {hero} and {friend} were the best of friends.",
    "And so {hero} learned that everything is easier with a friend.",
    '"See you tomorrow!" called {friend}. "See you tomorrow!" called {hero}.',
    "They stayed friends for the rest of their lives.",
    "And whenever one of them needed help, the other one was there.",
)
