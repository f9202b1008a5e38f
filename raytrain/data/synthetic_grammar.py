"""The words and sentences of the embedded synthetic corpus; synthetic.py explains them."""

from __future__ import annotations

WORDS: dict[str, str] = {
    "name": "Sam|Anna|Tom|Maria|Ben|Lucy|James|Emma|Jack|Sara|Leo|Kate|Omar|Nina|Paul|Zoe|Ravi|Ella|Hugo|Ruth",
    "kin": "mum|dad|my sister|my brother|grandma|my cousin|my flatmate|my neighbour|my uncle|my aunt",
    "city": "London|Paris|Berlin|Leeds|Dublin|Madrid|Rome|Oslo|Boston|Chicago|Vienna|Bristol|Prague|Lisbon|Glasgow",
    "place": "the park|the beach|the library|the market|the station|the gym|the office|the airport|the river|town",
    "good": "great|lovely|brilliant|perfect|amazing|really good|wonderful|fantastic|so much fun|magic",
    "bad": "awful|terrible|boring|a disaster|a joke|rubbish|really bad|a nightmare|painful|so slow",
    "feeling": "happy|tired|excited|hungry|proud|nervous|relaxed|grateful|cold|sleepy|confused|bored",
    "sky": "rain|sun|snow|wind|fog|thunder|drizzle|hail|frost|mist",
    "team": "City|United|Rovers|the Lions|the Hawks|Athletic|the Bears|Wanderers|the Tigers|the Wolves",
    "position": "striker|keeper|captain|new signing|left back|defender|referee|coach",
    "food": "pizza|curry|pasta|soup|tacos|sushi|pancakes|noodles|burgers|fish and chips|salad|dumplings|toast|pie",
    "drink": "coffee|tea|water|hot chocolate|orange juice|lemonade|iced tea|milk",
    "cake": "banana bread|carrot cake|brownies|scones|apple crumble|cookies|cheesecake|muffins",
    "animal": "dog|cat|rabbit|hamster|parrot|puppy|kitten|tortoise",
    "pet": "Biscuit|Luna|Milo|Daisy|Rex|Pepper|Oscar|Molly",
    "artist": "the Night Owls|Paper Boats|Silver Lane|the Kites|Blue Harbour|Echo Street|Marla Reed|the Foxes",
    "style": "jazz|rock|folk|indie|soul|techno|blues|country",
    "instrument": "guitar|piano|drums|violin|bass|ukulele|cello|trumpet",
    "film": "comedy|thriller|documentary|horror film|western|musical|cartoon|love story",
    "task": "a report|some emails|the slides|a deadline|the budget|an interview|a code review|paperwork",
    "subject": "maths|history|physics|biology|French|chemistry|geography|economics",
    "item": "shoes|jeans|headphones|a jacket|a lamp|a phone case|a backpack|sunglasses|a kettle|a bike",
    "device": "phone|laptop|printer|tablet|camera|keyboard|watch|charger",
    "exercise": "yoga|swimming|running|cycling|squats|boxing|climbing|pilates",
    "issue": "housing|transport|climate|health|schools|jobs|energy|taxes",
    "person": "the mayor|the minister|the council|the police|the union|a spokesman|the court|the senate",
    "plant": "tomatoes|roses|basil|tulips|sunflowers|herbs|potatoes|lavender",
    "colour": "blue|green|white|yellow|grey|pink|red|orange",
    "season": "spring|summer|autumn|winter",
    "when": "today|tonight|this morning|tomorrow|yesterday|this week|this afternoon|on the way home",
    "soon": "tomorrow|tonight|next week|soon|later|at the weekend|next month|in the morning",
    "activity": "reading|cooking|sleeping|dancing|drawing|hiking|gaming|baking|gardening|knitting",
}
"""Choices with Zipf-like probabilities, most likely first."""
NUMBERS: dict[str, str] = {
    "day": "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday",
    "hour": "1|2|3|4|5|6|7|8|9|10|11|12",
    "minute": "|".join(f"{minute:02}" for minute in range(60)),
    "goal": "0|1|2|3|4",
    "few": "2|3|4|5|6|7|8|9",
    "count": "|".join(str(count) for count in range(10, 100)),
}
"""Choices with uniform probabilities."""
ADDRESS: tuple[tuple[str, float], ...] = (("", 0.66), ("@userid ", 0.24), ("RT @userid: ", 0.1))
EXCLAMATION: tuple[tuple[str, float], ...] = (
    ("", 0.8),
    ("Wow! ", 0.06),
    ("Yes! ", 0.05),
    ("Ugh! ", 0.05),
    ("Haha! ", 0.04),
)
TAIL: tuple[tuple[str, float], ...] = (
    ("", 0.6),
    (", it is {hour}:{minute}", 0.2),
    (", {name} agrees", 0.2),
)
"""Tails, which may follow any body except a question."""
MARK: tuple[tuple[str, float], ...] = (("", 0.4), ("!", 0.3), (".", 0.18), ("...", 0.07), ("!!!", 0.05))
LINK: tuple[tuple[str, float], ...] = (("", 0.86), (" url", 0.14))
COMMON_EMOJI = "😀|✨|🙈|💙"
COMMON_TAGS = "life|mood|today|tbt|fail|win|photo|lol"
NO_EMOJI = 0.5
NO_TAG = 0.5
NO_COMMON_TAG = 0.7
TOPICS: dict[str, str] = {
    "weather": """
        ☀️|🌧️|❄️|🌈
        weather|rain|sunshine|forecast
        So much {sky} in {city} {when}
        It is {season} and there is still {sky} in {city}
        Is it ever going to stop with the {sky}?
        Woke up to {sky} again[, staying in bed]
        {count} degrees in {city}! Off to {place}
    """,
    "football": """
        ⚽|🏆|🔥|😡
        football|matchday|goal|derby|cup
        What a goal from the {position}! {goal}-{goal}
        Full time: {team} {goal} {team} {goal}
        Come on {team}[, we can still win this]
        The {position} was {bad} {when}
        How did {team} lose that?
    """,
    "food": """
        😋|🍕|🍰|☕
        food|foodie|dinner|baking|yum
        {food} for dinner again[ and I am not sorry]
        Made {cake} with {kin}, it was {good}
        Who wants {food} {when}?
        Need {drink} before I talk to anyone
        {name} made {cake} [for the whole office]
    """,
    "trains": """
        🚆|😤|🚌|😴
        commute|delays|trains|travel
        The {hour}:{minute} to {city} is late again[, thanks for nothing]
        Train to {city} delayed by {count} minutes
        No seats on the {hour}:{minute} from {city} [as always]
        Why is the {hour}:{minute} always cancelled?
        Finally a train on time, {city} here I come
    """,
    "music": """
        🎶|🎸|❤️|🎧
        music|nowplaying|gig|newmusic
        Now playing: {artist} [live in {city}]
        The new album by {artist} is {good}
        {artist} in {city} on {day}, who is coming?
        Listening to {style} on the way to {place}
        Can anyone recommend some {style}?
    """,
    "work": """
        😩|💻|☕|🙌
        work|worklife|deadline|office
        Still at work, {task} to finish [before {hour}]
        Spent all {day} on {task}[ and nobody read it]
        Meeting at {hour}:{minute}, could have been an email
        Is it {day} yet?
        Forgot about {task}, feeling {feeling}
    """,
    "news": """
        📰|🚨|👀|🤔
        news|breaking|politics|vote
        Breaking: {person} to speak about {issue} at {hour}:{minute}
        {person} says {issue} is the top priority
        New plan for {issue} in {city} [rejected by {person}]
        What is {person} going to do about {issue}?
        {city} votes on {issue} {soon}
    """,
    "pets": """
        🐶|🐱|😍|🐾
        pets|dogs|cats|cute
        {pet} the {animal} is asleep on my {device} again
        My {animal} just ate my {food}[ and looks proud]
        Happy birthday to my {animal} {pet}, {few} today
        {pet} hates the {sky}
        Why does my {animal} wake me at {hour}:{minute}?
    """,
    "thanks": """
        🙏|❤️|😊|🎉
        thanks|thankyou|grateful|ff
        Thank you so much for the {cake}[, you are too kind]
        Thanks for the follow[, have a great {day}]
        Thanks {name}, that was {good}
        Big thanks to {name} for the {instrument} lesson
        Thank you {city}, you were {good}
    """,
    "questions": """
        🤔|👀|😅|🙋
        help|question|advice|askme
        Does anyone know how to fix a {device}?
        Where can I get good {food} in {city}?
        Anyone going to {city} {soon}?
        Should I buy {item} in {colour} or {colour}?
        Which is better, {activity} or {activity}?
    """,
    "school": """
        📚|😭|🎓|😴
        exams|school|student|revision
        {subject} exam {soon} and I know nothing
        {few} hours of {subject} [and I still do not get it]
        Passed my {subject} exam[, drinks on me]
        Our {subject} teacher is {good}
        Who has the notes for {subject}?
    """,
    "family": """
        ❤️|😂|👶|🥰
        family|mumlife|sunday|love
        {kin} just called to talk about {sky}
        {kin} still cannot use a {device}[, help]
        Helping {kin} move to {city} on {day}
        {kin} is {activity} and I am {activity}
        Happy birthday {name}[, have a lovely day]
    """,
    "shopping": """
        🛍️|💸|👟|😍
        shopping|sale|deal|fashion
        Bought {item} instead of paying rent
        {item} with {count} percent off, only on {day}
        Went out for milk, came back with {item}
        Ordered {item} {few} weeks ago, still waiting
        Do I really need {item}?
    """,
    "travel": """
        ✈️|🏖️|😎|🌍
        holiday|travel|wanderlust|views
        {few} days until {city}, so {feeling}
        Hello {city}[, you look {good}]
        Flight to {city} at {hour}:{minute} in the morning
        Sunset over {place} in {city} is {good}
        Which part of {city} should I stay in?
    """,
    "films": """
        🎬|🍿|😱|📺
        film|movies|netflix|oscars|tv
        Watching a {film} with {name} {when}
        That {film} was {good}[, no spoilers please]
        Fell asleep {count} minutes into the {film}
        Any good {film} to watch {soon}?
        Popcorn and a {film}, ideal {day}
    """,
    "health": """
        💪|🏃|😅|🥵
        fitness|gym|running|health|run
        {few} miles before breakfast, feeling {feeling}
        {exercise} with {name} at {hour}:{minute} [was {bad}]
        Signed up for {exercise}, what was I thinking
        Ran to {place} and back in {count} minutes
        Does {activity} count as {exercise}?
    """,
    "home": """
        🌱|🏡|🧹|🌻
        garden|home|diy|spring
        My {plant} are finally growing
        Painting the kitchen {colour} {when}
        The neighbours are {activity} at {hour}:{minute} again
        No hot water since {day}[, how are you]
        Is {colour} a good colour for a bedroom?
    """,
    "tech": """
        🤖|💻|📱|😤
        tech|coding|startup|app|gadgets
        My {device} needs {few} updates before {drink}
        New {device} arrived, it is {good}
        Dropped my {device} in the {drink}
        Why is my {device} so slow?
        It works on my {device}
    """,
    "night": """
        🌙|😴|🎉|🕺
        goodnight|weekend|friday|party|sleep
        Cannot sleep, {activity} at {hour}:{minute}
        Good night {city}, sleep well
        Party at {place} on {day}, bring {food}
        Up at {hour}:{minute} for no reason
        Is everyone else {activity}?
    """,
}
"""Topics, most likely first: a line of emoji, a line of hashtags, then the bodies, each in the same order.

In a body, ``{name}`` is a word from that list, and ``[...]`` is included half of the time.
"""
