"""A seeded grammar of short stories: the whole training text of the demo model.

Every story follows one of several plots. The plots draw their characters, places, things, weather
and sentences from the lists of :mod:`p2pinfer.demo.words`, so that the number of different stories
is far beyond what the model could memorise: it has to learn how a story works.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from p2pinfer.demo import words
from p2pinfer.demo.narrator import Story, with_article


def introduce(story: Story) -> None:
    """Open the story: who the hero is and where the hero lives."""
    story.say(*words.OPENINGS)
    story.maybe(*words.DETAILS, chance=0.6)


def meet_friend(story: Story) -> None:
    """Bring the friend into the story, with a greeting."""
    story.say(
        "Just then, {a_ftrait} {fkind} named {friend} came along.",
        "On the way, {he} met {a_ftrait} {fkind} named {friend}.",
        "Soon {a_ftrait} {fkind} came down the path. {Fhis} name was {friend}.",
        "{A_fkind} named {friend} was sitting on {spot} and saw everything.",
    )
    story.say(*words.GREETINGS)


def close(story: Story, together: bool = True) -> None:
    """End the story with a quiet picture; without the friend unless they met for certain."""
    story.paragraph()
    story.say(*(words.EVENINGS_TOGETHER if together else words.EVENINGS_ALONE))
    story.say(*(words.ENDINGS_TOGETHER if together else words.ENDINGS_ALONE))


def lost_thing(story: Story) -> None:
    """The hero loses something dear and finds it again with a friend."""
    introduce(story)
    story.say(
        "More than anything, {he} loved {his} {thing}.",
        "{His} favorite thing in the world was {a_thing}.",
        "{He} had {a_thing} that {elder} had given {him}.",
        "Wherever {he} went, {he} took {his} {thing} along.",
    )
    story.paragraph()
    story.say(
        "But one {weather} {time}, the {noun} was gone.",
        "One {weather} {time}, {he} looked for the {noun}, but it was not there.",
        "Then, one {weather} {time}, {hero} could not find the {noun} anywhere.",
    )
    story.say(*words.SEARCHES)
    story.maybe(*words.SADNESS, chance=0.7)
    meet_friend(story)
    story.say(
        '"I have lost my {thing}," said {hero}.',
        '"My {thing} is gone," {hero} answered.',
        '"I cannot find my {noun}," {hero} said with a sigh.',
    )
    story.say(*words.OFFERS)
    story.paragraph()
    story.say(
        "Together they walked to {place2}.",
        "So the two of them went all the way to {place2}.",
        "{Hero} and {friend} set off for {place2}.",
    )
    story.maybe(*words.TRAVELS)
    story.say(
        "There, behind {spot}, something was shining. It was the {thing}!",
        "{Friend} looked behind {spot} and laughed. There was the {thing}!",
        "All at once {hero} saw it. The {thing} was lying next to {spot}!",
        "And what was that beside {spot}? It was the {noun}!",
    )
    story.say(
        '"You found it!" cried {hero}, and {he} hugged {friend}.',
        '"Thank you, {friend}!" said {hero}. "I would never have found it alone."',
        "{Hero} held the {noun} close and thanked {friend} again and again.",
    )
    close(story)


def someone_in_trouble(story: Story) -> None:
    """The hero hears a cry for help, and the one who is saved becomes a friend."""
    introduce(story)
    story.paragraph()
    story.say(
        "One {weather} {time}, {he} heard a small voice {at2}.",
        "One {time}, while {he} was walking {at2}, {he} heard someone call.",
        "On {a_weather} {time}, a cry came from {place2}.",
    )
    story.say(
        '"Help! Please help me!" called the voice.', '"Is anyone there?" it called. "I need help!"'
    )
    trouble, fix = story.rng.choice(words.TROUBLES)
    story.say(
        "It was {a_ftrait} {fkind} named {friend}. " + trouble,
        "{Hero} ran as fast as {he} could. There was {a_ftrait} {fkind} named {friend}. " + trouble,
    )
    story.say(*words.COMFORTS)
    story.paragraph()
    story.say(
        "{Hero} thought for a moment.",
        "At first {hero} did not know what to do. Then {he} had an idea.",
        "{Hero} looked around and took a deep breath.",
    )
    story.say(fix)
    story.say(
        '"You saved me!" said {friend}. "How can I ever thank you?"',
        '"Oh, thank you!" said {friend}. "You are very brave, {hero}."',
        '{Friend} smiled from ear to ear. "What a good heart you have," {fhe} said.',
    )
    story.say(
        '"You can be my friend," said {hero}.',
        '"That is what friends are for," said {hero}.',
        '"I am just glad that you are safe," {hero} answered.',
    )
    story.maybe(
        "The next day, {friend} brought {hero} {a_gift}. {Hero} kept the {gift} forever.",
        "As a gift, {friend} gave {him} {a_gift}, and {hero} was very proud of the {gift}.",
        "From then on, {friend} visited {hero} every single day.",
        chance=0.7,
    )
    close(story)


def storm(story: Story) -> None:
    """Bad weather surprises the two friends, and they find shelter."""
    introduce(story)
    story.say(
        "{His} best friend was {a_ftrait} {fkind} named {friend}.",
        "{He} liked to play with {friend}, {a_ftrait} {fkind}.",
    )
    story.paragraph()
    story.say(
        "One {time}, the two friends went to {place2} to play.",
        "One {time}, {hero} and {friend} were playing {at2}.",
        "One {time}, they walked to {place2} with some {snack} in a basket.",
    )
    story.say(*words.STORMS)
    story.say(
        '"We must find a dry place," said {friend}.',
        '"I am scared," said {hero}. "Stay close to me," said {friend}.',
        '"Quick, follow me!" called {friend}.',
        '"What should we do now?" asked {hero}.',
    )
    story.paragraph()
    shelter = story.rng.choice(words.SHELTERS)
    story.put("shelter", shelter)
    story.say(
        "They ran and ran until they came to {shelter}.",
        "Not far away, {hero} saw {shelter}, and they hurried inside.",
        "Luckily, {friend} knew {shelter} nearby.",
    )
    story.say(
        "It was warm and dry in there. They shared some {snack} and told each other stories.",
        "They sat close together, ate some {snack}, and sang songs until they were not afraid.",
        "Inside, they listened to the wind and counted slowly to one hundred.",
    )
    story.say(
        "At last the clouds went away, and a bright rainbow stood over {place2}.",
        "After a while the wind grew quiet, and the sun came out again.",
        "When they looked outside again, {sky}.",
    )
    story.say(
        '"That was an adventure!" said {friend}, and they both laughed.',
        '"Look how beautiful it is!" said {hero}.',
        '"With you, I am never afraid for long," said {hero}.',
    )
    close(story)


def making(story: Story) -> None:
    """The hero wants to make something, lacks one part, and shares the result."""
    product, part, where, finish = story.rng.choice(words.PROJECTS)
    for key, value in (("product", product), ("part", part), ("where", where)):
        story.put(key, value)
    introduce(story)
    story.paragraph()
    story.say(
        "One {weather} {time}, {hero} wanted to make {product} for {elder}.",
        'One {weather} {time}, {hero} had an idea. "I will make {product} for {elder}," {he} said.',
        "It was almost the birthday of {elder}, so {hero} decided to make {product}.",
    )
    story.say(
        "But when {he} began, there was no {part}.",
        "{He} had everything except {part}.",
        "Only one thing was missing. There was no {part} left.",
    )
    meet_friend(story)
    story.say(
        '"I need some {part}," said {hero}. "Do you know where I can find it?"',
        '"I want to make {product}, but I have no {part}," said {hero}.',
    )
    story.say(
        '"There is plenty of it {where}," said {friend}. "Come with me!"',
        '"I know! We can get {part} {where}," said {friend}.',
        '{Friend} thought about it. "Let us look {where}," {fhe} said.',
    )
    story.paragraph()
    story.say(
        "They went there together and came back with more than enough {part}.",
        "It was true. They filled a whole basket with {part} and carried it home.",
        "They found all the {part} that they needed, and they sang all the way back.",
    )
    story.say(finish)
    story.say(
        '"It is wonderful!" said {elder}. "Did you make it all alone?" "No," said {hero}, '
        '"{friend} helped me."',
        '{Elder} was so happy that {ehe} danced around the room. "Thank you both!" {ehe} said.',
        '"This is the best present I ever got," said {elder}.',
    )
    close(story)


def fear(story: Story) -> None:
    """The hero is afraid of something and learns, with help, to be brave."""
    scary, step, after = story.rng.choice(words.FEARS)
    story.put("scary", scary)
    introduce(story)
    story.say(
        "There was only one problem. {He} was afraid of {scary}.",
        "But {hero} had a secret. {He} was very much afraid of {scary}.",
        "{He} was not afraid of many things, but {he} was afraid of {scary}.",
    )
    story.paragraph()
    story.say(
        "One {time}, {hero} told {his} secret to {friend}, {a_ftrait} {fkind}.",
        (
            "One {weather} {time}, {he} met {a_ftrait} {fkind} named {friend} and told {fhim} "
            "about it."
        ),
        "One {time}, {a_fkind} named {friend} asked {him} why {he} looked so sad.",
    )
    story.say(
        '"I wish I could be brave like you," {he} said.',
        '"Please do not laugh at me," said {hero}.',
        '"I am afraid of {scary}," said {hero} in a small voice.',
    )
    story.say(
        '"Everyone is afraid of something," said {friend}. "Let us try it together."',
        '{Friend} did not laugh. "We can go slowly," {fhe} said, "one little step at a time."',
        '"Being brave means trying even when you are afraid," said {friend}.',
    )
    story.paragraph()
    story.say(step)
    story.say(
        "{His} heart was beating fast, but {friend} stayed close.",
        "{He} wanted to run away, but then {he} looked at {friend} and stayed.",
        '"You can do it, {hero}!" said {friend}.',
    )
    story.say(after)
    story.say(
        '"I did it!" shouted {hero}. "I really did it!"',
        "{Hero} could hardly believe it. {He} jumped up and down with joy.",
        '"You see?" said {friend}. "You were brave all along."',
    )
    close(story)


def sharing(story: Story) -> None:
    """Two friends want the same thing, quarrel about it, and make up."""
    introduce(story)
    story.maybe("{He} had a good friend, {a_ftrait} {fkind} named {friend}.", chance=1.0)
    story.paragraph()
    story.say(
        "One {weather} {time}, they found {a_thing} {at2}.",
        "One {time}, as they were walking {at2}, they saw {a_thing} next to {spot}.",
    )
    story.say('"It is mine!" said {hero}.', '"I saw it first!" cried {hero}.')
    story.say(
        '"No, it is mine!" said {friend}.', '"That is not fair!" said {friend}. "I want it too!"'
    )
    story.say(
        "They pulled and pulled, until the {noun} fell into the mud.",
        "They shouted so loudly that all the birds flew away.",
        "{Hero} took the {noun} and ran home without saying goodbye.",
    )
    story.say(
        "Then both of them went home and felt very lonely.",
        "For the rest of the day, they did not say a single word to each other.",
    )
    story.paragraph()
    story.say(
        "That night, {hero} could not sleep. The {noun} was no fun without {friend}.",
        '{Elder} saw that {hero} was sad. "A friend is worth more than any {noun}," {ehe} said.',
        "{Hero} thought about it for a long time. Then {he} knew what to do.",
    )
    story.say(
        (
            'The next morning, {he} went to {friend}. "I am sorry," {he} said. "Let us share the '
            '{noun}."'
        ),
        (
            'Early the next day, {he} knocked at the door of {friend}. "You can have the '
            '{noun}," {he} said.'
        ),
    )
    story.say(
        '"I am sorry too," said {friend}. "It is more fun when we play together."',
        '{Friend} smiled. "We can take turns," {fhe} said. "Today you, and tomorrow me."',
    )
    close(story)


def journey(story: Story) -> None:
    """The hero sets out to see something far away and comes home with a tale."""
    goal, sight = story.rng.choice(words.GOALS)
    story.put("goal", goal)
    introduce(story)
    story.say(
        "Every night {he} dreamed of seeing {goal}.",
        "{Elder} had often told {him} about {goal}, and {he} wanted to see it.",
        "{He} had one big wish. {He} wanted to see {goal}.",
    )
    story.paragraph()
    story.say(
        "One {weather} {time}, {hero} packed some {snack} and {a_thing} and set off.",
        "So one {time}, {he} put {a_thing} and some {snack} into a bag and said goodbye.",
    )
    story.maybe(*words.TRAVELS, chance=0.8)
    meet_friend(story)
    story.say(
        '"I am on my way to see {goal}," said {hero}. "Do you want to come with me?"',
        '"I want to see {goal}, but I do not know the way," said {hero}.',
    )
    story.say(
        '"Oh yes!" said {friend}. "I have always wanted to see that."',
        '"It is far away," said {friend}, "but I will show you the path."',
    )
    story.paragraph()
    story.say(
        "They walked past {place2}, over a hill, and through a long valley.",
        "They walked for two days. At night they slept under the stars {at2}.",
        "When they were tired, they rested on {spot} and shared the {snack}.",
    )
    story.maybe(
        "Once they lost their way, but {friend} climbed a tall tree and found it again.",
        "A kind old farmer gave them a ride on his cart.",
        "They crossed a narrow bridge, holding each other tightly.",
    )
    story.say(
        "And then, at last, they were there.", "Finally, they came to the top of the last hill."
    )
    story.say(sight)
    story.say(
        '"It is even better than in my dreams," whispered {hero}.',
        '"Was it worth the long way?" asked {friend}. "Every step," said {hero}.',
        "For a long time, neither of them said a word.",
    )
    close(story)


def garden(story: Story) -> None:
    """The hero plants a seed, waits with patience, and shares what grows."""
    plant, fruit = story.rng.choice(words.PLANTS)
    story.put("plant", plant)
    story.put("a_plant", with_article(plant))
    story.put("fruit", fruit)
    introduce(story)
    story.paragraph()
    story.say(
        "One {weather} {time}, {elder} gave {him} a tiny seed.",
        "One {time}, {he} found a tiny seed {at2}.",
        "One {time}, {a_fkind} named {friend} gave {him} a tiny seed.",
    )
    story.say(
        "{Hero} dug a hole next to {spot}, put the seed inside, and gave it some water.",
        "{He} planted it behind the house and watered it with {his} little can.",
    )
    story.say(
        "The next day {he} looked, but nothing was there. The day after, still nothing.",
        '"When will it grow?" {he} asked every day. "Be patient," said {elder}.',
        "{He} waited one day, two days, three days, but nothing happened.",
    )
    story.maybe(
        (
            "When it was hot, {he} brought water. When it was cold, {he} covered the ground with "
            "straw."
        ),
        "{He} even sang a song to the seed before going to bed.",
        "Some of the others laughed, but {hero} did not give up.",
        chance=0.7,
    )
    story.paragraph()
    story.say(
        "Then, after a night of soft rain, a little green leaf looked out of the ground.",
        "One morning, {he} rubbed {his} eyes. There was a small green leaf!",
    )
    story.say(
        "Week after week it grew, until it was {a_plant} taller than {hero}.",
        "It grew and grew, and by the end of the summer it was a big, strong {plant}.",
    )
    story.say(
        "It was full of {fruit}, and {hero} shared them with everyone {at}.",
        "It carried so many {fruit} that {hero} invited all of {his} friends to a feast.",
    )
    story.say(
        '"Good things take time," said {elder} with a smile.',
        '"You never gave up," said {elder}. "I am proud of you."',
        '"From such a tiny seed!" said {hero}, and {he} saved one new seed for the next spring.',
    )
    close(story, together=False)


def strange_noise(story: Story) -> None:
    """A noise in the night turns out to be harmless, or even a new friend."""
    noise, cause = story.rng.choice(words.NOISES)
    story.put("noise", noise)
    introduce(story)
    story.paragraph()
    story.say(
        "One night, {hero} was lying in bed when {he} heard a strange noise.",
        "One dark night, a strange noise woke {him} up.",
        "Late one night, something outside made a noise.",
    )
    story.say('"{Noise}," it went. "{Noise}."', '"{Noise}, {noise}," it went, again and again.')
    story.say(
        '"Is it a monster?" whispered {hero}, and {he} pulled the blanket over {his} head.',
        '"Who is there?" asked {hero}, but nobody answered.',
        "{Hero} held {his} breath and listened. There it was again!",
    )
    story.paragraph()
    story.say(
        "At last {he} took {a_thing} in one hand and a lamp in the other and went outside.",
        "But {he} was curious, too. So {he} lit a small lamp and opened the door.",
        "Then {he} got up, took a lamp, and went slowly out into the dark.",
    )
    story.say(
        "The moon was shining on {place2}. Step by step, {he} came closer to the noise.",
        "{He} looked behind {spot}, and {he} looked under the bench. Nothing.",
    )
    story.say(cause, cause + " What a surprise!")
    story.say(
        '"I am sorry that I woke you," said {friend}.',
        '"Good evening," said {friend}. "Were you afraid of me?"',
        '"Please do not be angry," said {friend} in a small voice.',
    )
    story.say(
        '{Hero} laughed. "And I thought that you were a monster!" {he} said.',
        '"Come inside," said {hero}. "I have some {snack} and warm milk for you."',
    )
    close(story)


PLOTS: tuple[Callable[[Story], None], ...] = (
    lost_thing,
    someone_in_trouble,
    storm,
    making,
    fear,
    sharing,
    journey,
    garden,
    strange_noise,
)


def tell(seed: int) -> str:
    """Return the story of a seed; the same seed always gives the same story."""
    rng = random.Random(seed)
    plot = rng.choice(PLOTS)
    story = Story(rng)
    plot(story)
    return story.text()


def stories(first_seed: int = 0) -> Iterator[str]:
    """Yield stories without end, one for each seed from the first on."""
    seed = first_seed
    while True:
        yield tell(seed)
        seed += 1
